//! Members that vouch for bytes that the origin does not have: what agents do about them, in the model.
//!
//! Whatever a liar reads for the others is wrong and looks right, until the sha256 of the whole does not match.
//! Then a node reads one piece of each that vouched from the origin, bans who lied, and begins anew. Not here:
//! wrong bytes that are not what was vouched for (`transfers`).

use std::collections::{BTreeMap, BTreeSet};

use super::world::World;
use crate::pieces::Bitfield;
use crate::swarm::Event;

/// Who vouched for what, in a run with liars; nothing is kept in others.
#[derive(Default)]
pub(super) struct Lies {
    pub(super) liars: BTreeSet<u32>,
    /// By (node, blob, piece): who read the piece there is from the origin.
    vouched: BTreeMap<(u32, u16, u32), u32>,
    /// (node, liar) for those that have found it out.
    known: BTreeSet<(u32, u32)>,
}

impl World<'_> {
    /// A piece came from the origin.
    pub(super) fn vouch(&mut self, n: u32, blob: u16, piece: u32) {
        if !self.lies.liars.is_empty() {
            self.lies.vouched.entry((n, blob, piece)).or_insert(n);
        }
    }

    /// A piece went from node to node, and who vouches for it with it.
    pub(super) fn pass_on(&mut self, from: u32, to: u32, blob: u16, piece: u32) {
        if let Some(importer) = self.lies.vouched.get(&(from, blob, piece)).copied() {
            self.lies.vouched.entry((to, blob, piece)).or_insert(importer);
        }
    }

    /// Whether `to` knows that who vouches for a piece at `from` lies.
    pub(super) fn is_of_liar(&self, from: u32, to: u32, blob: u16, piece: u32) -> bool {
        let importer = self.lies.vouched.get(&(from, blob, piece));
        importer.is_some_and(|importer| self.lies.known.contains(&(to, *importer)))
    }

    /// All pieces of a blob are at a node: whether they are right. Where not, it begins anew without the liar.
    pub(super) fn is_right(&mut self, n: u32, blob: u16) -> bool {
        if self.lies.liars.is_empty() || self.lies.liars.contains(&n) {
            return true;
        }
        let all = self.lies.vouched.range((n, blob, 0)..=(n, blob, u32::MAX));
        let mut importers: BTreeMap<u32, u32> = BTreeMap::new();
        all.for_each(|((_, _, piece), importer)| {
            importers.entry(*importer).or_insert(*piece);
        });
        let Some(liar) = importers.keys().copied().find(|importer| self.lies.liars.contains(importer)) else {
            return true;
        };
        // In this order, until one is found; its own pieces it need not look at.
        let looked_at = importers.range(..=liar).filter(|(importer, _)| **importer != n);
        self.outcome.origin_bytes += looked_at.map(|(_, piece)| self.bytes(blob, *piece)).sum::<u64>();
        self.begin_anew(n, blob, liar);
        false
    }

    fn begin_anew(&mut self, n: u32, blob: u16, liar: u32) {
        self.outcome.restarts += 1;
        self.lies.known.insert((n, liar));
        self.lies.vouched.retain(|(node, wanted, _), _| (*node, *wanted) != (n, blob));
        let (digest, layout) = self.blobs[usize::from(blob)];
        let ingest = &mut self.nodes[n as usize].ingests[usize::from(blob)];
        (ingest.have, ingest.count) = (Bitfield::new(layout.pieces()), 0);
        let have = ingest.have.clone();
        self.tell(n, Event::Unwant(digest));
        self.tell(n, Event::Lied(self.ids[liar as usize]));
        self.tell(n, Event::Want { blob: digest, layout, have, can_import: true, turn: 0 });
    }
}
