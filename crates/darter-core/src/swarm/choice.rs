//! Which piece to ask for next, and whom: the rarest inside the window, from somebody free.

use super::neighbour::Neighbour;
use super::peer::Dice;
use super::time::Time;
use crate::pieces::{Bitfield, bits};

/// What the choice is made from.
pub(super) struct Choice<'a> {
    pub(super) neighbours: &'a [Neighbour],
    /// Pieces that are missing and asked of nobody.
    pub(super) open: &'a Bitfield,
    /// Pieces of segments that are leased to us.
    pub(super) owned: &'a Bitfield,
    /// How many neighbours have each piece.
    pub(super) rarity: &'a [u16],
    /// Whom not to ask while anybody else can be: too slow.
    pub(super) slow: &'a [bool],
    pub(super) in_flight_per_peer: u8,
}

impl Choice<'_> {
    /// A piece and the place of the neighbour to ask. Pieces of our own leases go first, wherever
    /// they are; then the window `first..end`; what is after it only if nothing inside can be had.
    pub(super) fn make(&self, now: Time, window: (u32, u32), dice: &mut Dice) -> Option<(u32, usize)> {
        self.among(now, window, false, dice).or_else(|| self.among(now, window, true, dice))
    }

    fn among(&self, now: Time, window: (u32, u32), slow_too: bool, dice: &mut Dice) -> Option<(u32, usize)> {
        let free: Vec<usize> = (0..self.neighbours.len())
            .filter(|at| slow_too || !self.slow.get(*at).copied().unwrap_or(false))
            .filter(|at| self.neighbours[*at].is_free(now, self.in_flight_per_peer))
            .collect();
        if free.is_empty() {
            return None;
        }
        let words = self.open.words().len();
        let (first, end) = (u64::from(window.0), u64::from(window.1));
        let mut inside: Option<Rarest> = None;
        let mut outside: Option<Rarest> = None;
        for at in 0..words {
            let open = self.open.words()[at];
            if open == 0 {
                continue;
            }
            let owned = self.owned.words()[at];
            let available = free.iter().fold(0, |sum, place| {
                let neighbour = &self.neighbours[*place];
                sum | neighbour.have().words()[at] & if neighbour.is_scarce { owned } else { u64::MAX }
            });
            for bit in bits(open & available) {
                let index = at as u64 * 64 + bit;
                let rarity = self.rarity[usize::try_from(index).unwrap_or(usize::MAX)];
                let is_inside = (first..end).contains(&index) || owned >> bit & 1 == 1;
                let best = if is_inside { &mut inside } else { &mut outside };
                Rarest::offer(best, index, rarity, dice);
            }
        }
        let piece = inside.or(outside)?.piece;
        let holder = self.holder(&free, piece, dice)?;
        Some((u32::try_from(piece).ok()?, holder))
    }

    /// Whom of those that have the piece: who serves us least now and has most to give.
    fn holder(&self, free: &[usize], piece: u64, dice: &mut Dice) -> Option<usize> {
        let is_owned = self.owned.has(piece);
        free.iter()
            .copied()
            .filter(|at| {
                let neighbour = &self.neighbours[*at];
                neighbour.have().has(piece) && (is_owned || !neighbour.is_scarce)
            })
            .min_by_key(|at| {
                let neighbour = &self.neighbours[*at];
                // Scarce sources last: whoever else has the piece should give it.
                (neighbour.is_scarce, neighbour.in_flight, u8::MAX - neighbour.free_slots, dice.roll())
            })
    }
}

struct Rarest {
    piece: u64,
    rarity: u16,
    /// How many were as rare: each of them is kept with the same chance.
    ties: u64,
}

impl Rarest {
    fn offer(best: &mut Option<Self>, piece: u64, rarity: u16, dice: &mut Dice) {
        match best {
            Some(rarest) if rarity > rarest.rarity => {}
            Some(rarest) if rarity == rarest.rarity => {
                rarest.ties += 1;
                if dice.roll().is_multiple_of(rarest.ties) {
                    rarest.piece = piece;
                }
            }
            _ => *best = Some(Self { piece, rarity, ties: 1 }),
        }
    }
}
