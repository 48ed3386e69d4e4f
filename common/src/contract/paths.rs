//! Paths of the public API, the same on node and balancer.

/// OpenAI chat completions.
pub const CHAT_COMPLETIONS: &str = "/v1/chat/completions";
/// OpenAI text completions.
pub const COMPLETIONS: &str = "/v1/completions";
/// Short chat form: `messages` and `temperature`.
pub const CHAT: &str = "/v1/chat";
/// Shortest form: `query` in, `answer` out.
pub const API_CHAT: &str = "/api/v1/chat";
/// Models served.
pub const MODELS: &str = "/v1/models";
/// Health of the process.
pub const HEALTH: &str = "/health";
/// Prometheus metrics.
pub const METRICS: &str = "/metrics";

/// Paths whose POST is a generation, which the balancer carries as a stream.
pub const GENERATIONS: [&str; 4] = [CHAT_COMPLETIONS, COMPLETIONS, CHAT, API_CHAT];

/// Whether a POST to `path` is a generation.
pub fn is_generation(path: &str) -> bool {
    GENERATIONS.contains(&path)
}
