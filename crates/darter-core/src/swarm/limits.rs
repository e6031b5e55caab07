//! The bounds and constants of the swarm, each with its reason.

use std::time::Duration;

/// What bounds every table and wait of a `Swarm`. The defaults are those of production; tests and
/// the simulator change some.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Uploads at a time. Few, and refused beyond: with deep queues all receivers wait for the
    /// newest piece of one uploader. What few have doubles in the time that an upload takes, and uploads
    /// that share a link take as many times longer; but one connection alone may not fill a link.
    pub slots: u8,
    /// Uploads at a time to one peer: two pieces are sooner of use at two peers than at one.
    pub slots_per_peer: u8,
    /// Where only a few want the blob: one connection alone may not fill a link.
    pub slots_per_peer_few: u8,
    /// A slot is kept this long for a peer that was told that it is free.
    pub slot_patience: Duration,
    /// Peers that wait for a slot at one node.
    pub waiting_max: usize,
    /// Pieces asked for at a time: more than uploads at a time, so that uploads are what is short, and not
    /// by much. All share a link, so that each takes as many times longer, and is given on as much later.
    pub in_flight: usize,
    /// Where only a few want the blob: each neighbour has most of what is new, and gives it over one
    /// connection, which shares a link with others.
    pub in_flight_few: usize,
    /// So many are a few.
    pub few: u32,
    /// And at most, where answers take long: as many as a few ask for in any case.
    pub in_flight_max: usize,
    /// Pieces asked for at a time from one neighbour.
    pub in_flight_per_peer: u8,
    /// Neighbours that a node looks for. Twice as many make 64 nodes a third of a percent faster and 256 slower, and
    /// all of them hear of every piece.
    pub neighbours: usize,
    /// Neighbours that a node accepts at most, since others look for it too.
    pub neighbours_max: usize,
    /// The smallest window, in pieces.
    pub window_min: u32,
    /// Leases of one owner at a time, while others want the blob too: one is read, one waits.
    pub leases_per_owner: u8,
    /// Where only a few want it, of the origin: each reads as much as any other.
    pub leases_per_owner_few: u8,
    /// Leases at a time from one lone holder, which serves them in turn.
    pub leases_per_holder: u8,
    /// Origin leases of a blob at a time before a piece of it came; one more with every piece that comes. Where
    /// the origin's link is what limits, as many first pieces come late together, and nobody has anything
    /// before; and the links of the first readers are still free for what they read.
    pub imports_first: u32,
    /// And then. Eight keep a link full although each reader shares its own with what peers send.
    pub imports_start: u32,
    /// And at most, where an origin limits each connection.
    pub imports_max: u32,
    /// A lease that shows no progress for this long, or for four times what leases take, is given to another.
    pub lease_patience: Duration,
    /// An answer by the coordinator that takes longer is a lost coordinator.
    pub join_patience: Duration,
    /// Or, where answers have taken longer, four times what they took, but no longer than this.
    pub join_patience_max: Duration,
    /// After this many joins without an answer the next ranked member is asked.
    pub join_tries: u32,
    /// A node that has just started reads nothing from the origin for others before it heard of no new
    /// member for this long: it would be one of many who each think that they coordinate.
    pub settle_quiet: Duration,
    /// So long who takes a coordinator's place hears what is read already, and has read what most likely is
    /// not: the others do not all lose the one before at the same moment.
    pub gather: Duration,
    /// Or before it is this old.
    pub settle_max: Duration,
    /// Each zone reads the origin for itself: cheaper where the origin is free and zones are not.
    pub scope_is_zone: bool,
    /// HAVEs wait this long for company, unless the last one is older.
    pub have_delay: Duration,
    /// Or until there are this many.
    pub have_batch: usize,
    /// Or until there is one that fewer neighbours have: the fewer have a piece, the more a wait delays it
    /// for all.
    pub have_rare: u16,
    /// A piece request is never duplicated earlier than this.
    pub hedge_min: Duration,
    /// Nobody around has what is missing, for this long or four times what a piece takes: ask the
    /// coordinator.
    pub missing_patience: Duration,
    /// Who asks again after this time got nothing from whom it was sent to. On a busy machine the word that a segment
    /// is there takes so long to come, and in vain it would be read twice.
    pub vain_patience: Duration,
    /// Segments that one such question names.
    pub missing_max: usize,
    /// Blobs that one node coordinates; beyond, the oldest is forgotten. What it wants and holds is
    /// bounded by whoever wants and holds it.
    pub blobs_max: usize,
    /// Of these, blobs of which one other member spoke first: a store has some thousands at most, and
    /// one member must not push out what the others said.
    pub blobs_per_peer: u64,
    /// Blobs on their way at a time of which one other member spoke first. A node starts some images at
    /// once, of some dozens of layers each.
    pub tables_per_peer: u64,
    /// Their segments together, at 40 bytes each: 1 to 2 TiB that one node would pull at once.
    pub segments_per_peer: u64,
    /// Blobs at a time that a node which goes asks others to take, and that one takes for others.
    pub takes_max: usize,
    /// How long a node that goes waits for the others to say how much room they have.
    pub room_patience: Duration,
    /// A seed takes a blob of which nobody spoke for so long: those that pull it now come first.
    pub seed_quiet: Duration,
    /// Blobs that a seed takes at a time.
    pub seed_takes: usize,
    /// Blobs that a seed remembers to take.
    pub seed_wanted_max: usize,
    /// After this many failures it waits until somebody speaks of the blob again.
    pub seed_tries: u8,
    /// A seed that is refused for the sake of others asks again after this.
    pub seed_pause: Duration,
    /// One corrupt piece, or a broken promise: no connection for this long.
    pub ban_first: Duration,
    /// Three strikes within their half-life.
    pub ban_last: Duration,
    /// Strikes fade by half in this time.
    pub strike_half_life: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            slots: 3,
            slots_per_peer: 1,
            slots_per_peer_few: 2,
            slot_patience: Duration::from_millis(8),
            waiting_max: 256,
            in_flight: 5,
            in_flight_few: 12,
            few: 8,
            in_flight_max: 12,
            in_flight_per_peer: 2,
            neighbours: 12,
            neighbours_max: 24,
            window_min: 64,
            leases_per_owner: 2,
            leases_per_owner_few: 1,
            leases_per_holder: 6,
            imports_first: 3,
            imports_start: 8,
            imports_max: 32,
            lease_patience: Duration::from_secs(2),
            join_patience: Duration::from_millis(300),
            join_patience_max: Duration::from_secs(2),
            join_tries: 2,
            settle_quiet: Duration::from_millis(250),
            gather: Duration::from_millis(500),
            settle_max: Duration::from_secs(2),
            scope_is_zone: false,
            have_delay: Duration::from_millis(1),
            have_batch: 8,
            have_rare: 2,
            hedge_min: Duration::from_millis(50),
            missing_patience: Duration::from_millis(50),
            vain_patience: Duration::from_millis(400),
            missing_max: 64,
            blobs_max: 16_384,
            blobs_per_peer: 12_288,
            tables_per_peer: 4096,
            segments_per_peer: 131_072,
            takes_max: 8,
            room_patience: Duration::from_millis(300),
            seed_quiet: Duration::from_secs(5),
            seed_takes: 2,
            seed_wanted_max: 16_384,
            seed_tries: 8,
            seed_pause: Duration::from_millis(200),
            ban_first: Duration::from_secs(60),
            ban_last: Duration::from_secs(3600),
            strike_half_life: Duration::from_secs(600),
        }
    }
}
