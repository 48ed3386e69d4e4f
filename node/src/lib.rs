//! The inference server: one process, one model or several, an OpenAI API over continuous batching.
//!
//! The modules stand in the order of a request's life: [`http`] reads it, [`served`] has the model it names, [`text`] turns words to tokens, the [`engine`] thread plans
//! steps with [`sched`] over the [`kv`] pool, [`speculate`]s on what comes next, lays them out as a [`batch`], runs the [`model`] on its [`kernels`], [`sample`]s within a [`guide`], and
//! [`stop`]s; [`output`] turns tokens back into text, [`http`] sends it, and a [`record`] is kept. Beside the request: [`run()`] keeps the
//! process's own life from loading to the last handed-over stream by what its [`duty`] is, [`admin`] switches models and drains, `sizes` fits them to the `machine`,
//! [`weights`] reads model files, and [`models`] keeps them.

mod config;
mod machine;
mod sizes;
mod run;
pub mod duty;
pub mod admin;
pub mod http;
pub mod served;
pub mod text;
pub mod engine;
pub mod sched;
pub mod kv;
pub mod speculate;
pub mod batch;
pub mod model;
pub mod kernels;
pub mod sample;
pub mod guide;
pub mod stop;
pub mod output;
pub mod record;
pub mod weights;
pub mod models;

pub use config::{
    ADMIN_PORT, AdminConfig, Defaults, EngineLimits, LoadWhen, ModelConfig, NodeConfig, ReasoningParser, RequestLimits,
    TlsFiles, ToolParser,
};
pub use run::{RunError, run};
pub use sizes::Size;
