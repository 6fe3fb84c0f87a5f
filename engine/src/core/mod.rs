//! The engine's loop: one thread that owns the scheduler and the runner.
//!
//! ```text
//!   requests (async tasks)                      engine thread                        runner thread
//!   EngineHandle::submit ── Command ──>  inbox, drained at the top of a step and while one runs
//!   RequestHandle        <─ EngineEvent ─  schedule -> blocks -> plan ── submit ──>  forward, sample
//!                        <───────────── LayerWritten ───────────────────────────────  (as layers are written)
//!                        <─ EngineEvent ─  on_step_done  <───────────── wait ───────
//! ```
//!
//! While a step runs, commands are carried out, and whoever only awaits KV from another node is let in; whoever
//! computes here is with the next step. Dropping a [`RequestHandle`] cancels the request and unpins its blocks, those
//! that the running step uses at its end; beside it there is only [`PinnedPrefix`], which holds cached blocks while
//! they are read. The queues are bounded: a request's event channel has room for every event the request can cause,
//! and it sends at most a handful of commands.

mod engine_loop;
mod handle;
mod parked;
mod plan_builder;

pub use engine_loop::{COPIED_BYTES_PER_STEP, EngineOptions, start, start_reporting};
pub use handle::{EngineEvent, EngineHandle, EngineStatus, PinnedPrefix, RequestHandle};
