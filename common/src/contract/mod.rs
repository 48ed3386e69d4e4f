//! What crosses a process: the wire between balancer and node, and what the registry holds. Nothing here does I/O.
//!
//! A generation from balancer to node is always a stream of server-sent events, see [`event`]. The request's frame travels in the
//! [`headers`]; a stream that lost its node is taken up elsewhere by [`Resume`].

pub mod headers;
pub mod paths;
pub mod event;
mod error;
mod health;
mod record;
mod resume;

pub use error::{ApiError, ErrorKind, Refusal, error_event_at};
pub use event::EventId;
pub use health::{Health, ModelHealth, ModelState, Status};
pub use record::{KNOWN_MEMBERS_VERSION, KnownMembers, NodeRecord, RECORD_VERSION};
pub use resume::Resume;
