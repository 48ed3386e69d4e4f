//! Paths of the public API, the same on node and balancer.

/// OpenAI chat completions.
pub const CHAT_COMPLETIONS: &str = "/v1/chat/completions";
/// OpenAI text completions.
pub const COMPLETIONS: &str = "/v1/completions";
/// Short chat form: `messages` and `temperature`.
pub const CHAT: &str = "/v1/chat";
/// Shortest form: `query` in, `answer` out.
pub const API_CHAT: &str = "/api/v1/chat";
/// OpenAI responses.
pub const RESPONSES: &str = "/v1/responses";
/// Anthropic messages.
pub const MESSAGES: &str = "/v1/messages";
/// Vectors for texts.
pub const EMBEDDINGS: &str = "/v1/embeddings";
/// Text to tokens, as vLLM has it.
pub const TOKENIZE: &str = "/tokenize";
/// Tokens to text.
pub const DETOKENIZE: &str = "/detokenize";
/// The API as an OpenAPI document.
pub const OPENAPI: &str = "/openapi.json";
/// The same as a page for people.
pub const DOCS: &str = "/docs";
/// Models served.
pub const MODELS: &str = "/v1/models";
/// Health of the process.
pub const HEALTH: &str = "/health";
/// Prometheus metrics.
pub const METRICS: &str = "/metrics";

/// Paths whose POST is answered by a node of the model that the body names, over the wire of events that the balancer carries.
pub const GENERATIONS: [&str; 9] =
    [CHAT_COMPLETIONS, COMPLETIONS, CHAT, API_CHAT, RESPONSES, MESSAGES, EMBEDDINGS, TOKENIZE, DETOKENIZE];

/// Whether a POST to `path` is a generation.
pub fn is_generation(path: &str) -> bool {
    GENERATIONS.contains(&path)
}
