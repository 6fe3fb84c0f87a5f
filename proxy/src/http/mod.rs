//! The endpoint: paths, keys, limits, bodies and streams.
//!
//! [`router`] is the table of paths; [`admission`] what a request meets before its handler (id, key, slot);
//! [`generate`] the way of a generating request, and [`sse`] its streamed form; [`info`] everything else.
//! [`app`] is what all handlers share; [`server`] listens, within the bound of [`connections`], and drains.

pub mod admission;
pub mod app;
pub mod connections;
pub mod generate;
pub mod info;
pub mod prepare;
pub mod router;
pub mod server;
pub mod sse;

pub use app::{App, HttpSettings};
