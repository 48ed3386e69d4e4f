//! What `/health` says: what is true of a node now, for people, probes and routing alike.

use serde::{Deserialize, Serialize};

use crate::ids::{Color, Fingerprint, NodeId, SiteName};

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
    /// Each model that the node can serve now or on first use, and those on their way out. `running`, `waiting`, blocks and steps
    /// above are their sums. A node that says nothing here serves `model`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub models: Option<Vec<ModelHealth>>,
}

/// One model of a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelHealth {
    /// Its name in the API.
    pub name: String,
    /// Where it stands.
    pub state: ModelState,
    /// Sequences in its batch.
    pub running: u32,
    /// Sequences that wait for a place.
    pub waiting: u32,
    /// KV blocks free or evictable.
    pub kv_blocks_free: u32,
    /// All its KV blocks.
    pub kv_blocks_total: u32,
    /// Which nodes answer alike; known while it is in memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fingerprint: Option<Fingerprint>,
    /// More about the state.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// Where a model of a node stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ModelState {
    /// Not in memory; the first request loads it.
    Unloaded,
    /// On its way in; requests wait for it.
    Loading,
    /// Takes requests.
    Ready,
    /// Its sequences run and no step has finished within the bound.
    Stalled,
    /// Finishes what it has and takes nothing new.
    Unloading,
    /// Could not be loaded, and is not tried again yet.
    Failed,
    /// A state of a later release.
    #[serde(other)]
    Other,
}

impl ModelState {
    /// The word in the JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Unloaded => "unloaded",
            Self::Loading => "loading",
            Self::Ready => "ready",
            Self::Stalled => "stalled",
            Self::Unloading => "unloading",
            Self::Failed => "failed",
            Self::Other => "other",
        }
    }

    /// Whether a request for it makes sense; it may have to wait.
    pub fn takes_requests(self) -> bool {
        matches!(self, Self::Unloaded | Self::Loading | Self::Ready)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_of_a_later_release_takes_no_requests_and_breaks_nothing() {
        let text = r#"{"name":"m","state":"dreaming","running":0,"waiting":0,"kv_blocks_free":0,"kv_blocks_total":0}"#;
        let model: ModelHealth = serde_json::from_str(text).unwrap();
        assert!(!model.state.takes_requests());
    }
}
