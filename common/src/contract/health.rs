//! What `/health` says: what is true of a node now, for people, probes and routing alike.

use serde::{Deserialize, Serialize};

use crate::ids::{Color, NodeId, SiteName};

/// State of a node as it sees itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Takes requests.
    Healthy,
    /// The model is not ready yet.
    Loading,
    /// Finishes what it has and takes nothing new.
    Draining,
    /// Sequences run and no step has finished within the bound.
    Stalled,
}

impl Status {
    /// The word in the JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Healthy => "healthy",
            Self::Loading => "loading",
            Self::Draining => "draining",
            Self::Stalled => "stalled",
        }
    }
}

/// Body of a node's `GET /health`; 200 when healthy, else 503.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Health {
    /// State of the node.
    pub status: Status,
    /// Seconds since the process started.
    pub uptime: u64,
    /// The node's id.
    pub node: NodeId,
    /// The model's name in the API.
    pub model: String,
    /// Version of the model or its deployment.
    pub version: String,
    /// Blue or green.
    pub color: Color,
    /// Where the node stands.
    pub site: SiteName,
    /// Version of the Tidegate build.
    pub build: String,
    /// Device class, such as `cpu-avx512vnni` or `cuda-sm90`; answers are equal within one class and build.
    pub device: String,
    /// Most tokens of prompt and answer together.
    pub context: u32,
    /// Sequences in the batch.
    pub running: u32,
    /// Sequences that wait for a place.
    pub waiting: u32,
    /// KV blocks free or evictable.
    pub kv_blocks_free: u32,
    /// All KV blocks.
    pub kv_blocks_total: u32,
    /// Steps finished since start; grows while the node works.
    pub step: u64,
    /// Why the status is not healthy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}
