//! The frontend from outside: a foreign driver, a hostile one, and one that is killed, against a plane that keeps its
//! data in memory.

mod blkio_client;
mod plane;
mod protocol;
