//! Extents that the receiver reads where they lie in the sender's memory: two processes of one host.
//!
//! ```text
//! prefill node                                        decode node
//! pool in a sealed memfd
//! bulk connection  <────────── dial, mutual TLS ───── Fabric::connect_bulk
//!   Welcome { registration: socket, token } ────────>
//! UNIX socket      <──────────────────────── token ── same host? else nobody is there: quic
//!   same user? token known? once?  ── descriptor ──>  sealed? of that size? map it, read only
//!                  <───────────────────── attached ──
//!   from now on shm              ───── attached ───>
//!
//! each extent, over the same socket (`mailbox`)
//!   header, runs (offset, bytes) ──────────────────>  admit, hold the runs against pool and payload
//!                                                     slice by slice: copy into own blocks, hash them there
//!   the blocks may change again  <───────── taken ──  digest right: verified
//! ```
//!
//! The sender hashes its blocks and moves nothing; the receiver takes it in one pass: it copies a slice into
//! its own reserved blocks and hashes it there while it is in the cache.
//!
//! **One trust domain.** Who is attached can read the sender's whole pool, the KV of every request. Both ends
//! hold certificates of one cluster, are the same user on the same host, and were told so by their operator
//! (`--kv-transports`). Nobody but the sender can write: the memory is sealed against it.
//!
//! **No byte is trusted for having been read.** The sender may change a block while it is being read, by
//! mistake or because it gave the request up. The receiver reads the shared memory once and hashes its own
//! copy, in its own blocks; so what is in its blocks is what was proven, or the extent is refused. That is also
//! why no block needs quarantine here: what may run on after a stop, a lost connection or a closed landing is a
//! read, and a read that comes too late changes nothing at the sender and fails its digest, or has no landing, at
//! the receiver. In a design where the sender writes
//! into the receiver's memory, a write that cannot be proven to have stopped would have to keep the
//! destination's blocks out of use until the mapping is torn down; this one never lets anybody else write.
//!
//! A registration is valid for one bulk connection: its token is forgotten with the connection and works
//! once. The mapping lives as long as the receiver's end of the connection, and the socket and the connection end
//! each other: the connection is the lease, as everywhere, and says when the other end is gone or frozen.

mod attach;
mod inbox;
mod mailbox;
mod memory;
mod outbox;
mod registrar;

pub(crate) use attach::Attached;
pub(crate) use inbox::receive;
pub(crate) use outbox::Outbox;
pub(crate) use registrar::Registrar;
pub use registrar::SharedPool;
