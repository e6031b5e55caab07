//! What must hold after every event. The simulator asks; a node in production does not.

use super::Swarm;
use super::coordinator::Coordinator;
use super::download::Download;
use super::leases::Table;
use super::peer::PeerId;

/// What was found broken.
type Broken = &'static str;

impl Swarm {
    /// All invariants of this node.
    ///
    /// # Errors
    /// The first one that does not hold.
    pub fn check_invariants(&self) -> Result<(), Broken> {
        self.invariant_slots_are_few()?;
        holds(self.coordinated.due_is_right(&self.node.limits), "a coordinator is not looked at when it is due")?;
        for download in self.downloads.values() {
            self.invariant_neighbours_are_few(download)?;
            invariant_open_pieces_are_missing(download)?;
            invariant_pieces_are_asked_once(download)?;
            invariant_rarity_counts_neighbours(download)?;
        }
        self.coordinated.iter().try_for_each(|(_, state)| invariant_leases_are_counted(state))
    }

    fn invariant_slots_are_few(&self) -> Result<(), Broken> {
        let slots = usize::from(self.node.limits.slots);
        holds(self.node.slots.running() <= slots, "more uploads than slots")
    }

    /// What bounds the memory of a download, and what goes to others of it.
    fn invariant_neighbours_are_few(&self, download: &Download) -> Result<(), Broken> {
        let limits = &self.node.limits;
        holds(download.neighbours.len() <= limits.neighbours_max, "more neighbours than it accepts")?;
        let asked = download.neighbours.iter().map(|neighbour| neighbour.in_flight).max().unwrap_or(0);
        holds(asked <= limits.in_flight_per_peer, "more is asked of one neighbour than it should be")
    }
}

fn holds(condition: bool, broken: Broken) -> Result<(), Broken> {
    if condition { Ok(()) } else { Err(broken) }
}

fn invariant_open_pieces_are_missing(download: &Download) -> Result<(), Broken> {
    let overlap = download.open.words().iter().zip(download.have.words()).any(|(open, have)| open & have != 0);
    holds(!overlap, "a piece that is here is open")?;
    let missing = download.layout.pieces() - download.have.count();
    holds(download.is_complete() == (missing == 0), "the missing pieces are miscounted")
}

fn invariant_pieces_are_asked_once(download: &Download) -> Result<(), Broken> {
    let mut asked: Vec<(u32, bool)> = download.asked().collect();
    asked.sort_unstable();
    for (piece, _) in &asked {
        holds(!download.have.has(u64::from(*piece)), "a piece that is here is asked for")?;
        holds(!download.open.has(u64::from(*piece)), "a piece that is asked for is open")?;
    }
    let twice = asked.chunk_by(|(a, _), (b, _)| a == b);
    for same in twice {
        let hedged = same.iter().filter(|(_, is_hedged)| *is_hedged).count();
        holds(same.len() <= 2 && (same.len() == 1 || hedged == 2), "a piece is asked for twice without a hedge")?;
    }
    Ok(())
}

fn invariant_rarity_counts_neighbours(download: &Download) -> Result<(), Broken> {
    holds(download.rarity_is_right(), "rarity is not the number of neighbours that have a piece")?;
    holds(download.in_flight_is_right(), "requests to neighbours are miscounted")
}

fn invariant_leases_are_counted(coordinator: &Coordinator) -> Result<(), Broken> {
    holds(coordinator.leases_are_counted(), "leases of owners or holders are miscounted")?;
    holds(coordinator.incomplete_is_right(), "incomplete nodes are miscounted")
}

impl Download {
    /// The pieces that were asked for, and whether each is a hedge or hedged.
    fn asked(&self) -> impl Iterator<Item = (u32, bool)> {
        self.requests.iter().map(|request| (request.piece, request.is_hedged))
    }

    fn rarity_is_right(&self) -> bool {
        self.rarity.iter().zip(0_u64..).all(|(count, piece)| {
            let holders = self.neighbours.iter().filter(|neighbour| neighbour.have().has(piece)).count();
            usize::from(*count) == holders
        })
    }

    fn in_flight_is_right(&self) -> bool {
        self.neighbours.iter().all(|neighbour| {
            let asked = self.requests.iter().filter(|request| request.peer == neighbour.id).count();
            usize::from(neighbour.in_flight) == asked
        })
    }
}

impl Coordinator {
    fn leases_are_counted(&self) -> bool {
        let running: Vec<(PeerId, Option<PeerId>)> = self.tables.values().flat_map(Table::running).collect();
        let owners = self
            .interested
            .iter()
            .all(|(id, node)| running.iter().filter(|(owner, _)| owner == id).count() == usize::from(node.leases));
        let holders = self.holders.iter().all(|(id, holder)| {
            running.iter().filter(|(_, from)| *from == Some(*id)).count() == usize::from(holder.leases)
        });
        owners && holders
    }

    fn incomplete_is_right(&self) -> bool {
        self.interested.values().filter(|node| !node.is_complete).count() == self.incomplete
            && self.order.len() == self.interested.len()
    }
}
