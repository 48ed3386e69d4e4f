//! Configuration in two layers: a raw TOML table merged from file, environment and flags, and complete types checked from it once.
//!
//! A checked type is made by its own `read(&Reader)`. Reading never stops at the first fault: each is noted with its path and its
//! fix, a stand-in is returned, and [`Raw::check`] reports them all together.

mod raw;
mod reader;
mod value;
mod cluster;
mod telemetry;

pub use cluster::{ClusterConfig, EtcdConfig, LogConfig, LogFormat, RegistryConfig, read_pair};
pub use raw::{ENV_PREFIX, Raw};
pub use reader::{Problem, Problems, Reader};
pub use telemetry::TelemetryConfig;
pub use value::FromValue;
