//! What a node keeps: disks, and blobs on them, that fail; what an agent that is started again still knows;
//! images that are here before anybody asks.

mod disk;
mod prewarm;
mod restart;
mod rot;
mod warm;
