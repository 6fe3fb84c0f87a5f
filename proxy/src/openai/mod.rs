//! OpenAI's API as data: requests checked once at the edge, answers in its shapes, errors in its JSON.
//!
//! [`chat`] and [`completions`] turn a body into a [`ValidatedRequest`], which the rest of the proxy
//! never checks again. [`answers`] turns results into the bodies and chunks that clients expect.

pub mod answers;
pub mod chat;
pub mod completions;
pub mod error;
pub mod fields;
pub mod request;
pub mod sampling;

pub use error::{ApiError, ErrorKind};
pub use request::{ChatPrompt, Endpoint, Prompt, SamplingRequest, ValidatedRequest};
