//! Headers between balancer and node. The balancer strips every `x-tidegate-*` header that a client sends.

/// Everything that begins so is internal.
pub const INTERNAL_PREFIX: &str = "x-tidegate-";

/// The request's id, from the client or drawn at the edge; in every answer too.
pub const REQUEST_ID: &str = "x-request-id";

/// Seed of the sampler's randomness, an unsigned 64-bit decimal, drawn once at the edge so that a resumed stream goes on the same.
pub const SEED: &str = "x-tidegate-seed";

/// Unix time in seconds at which the edge took the request; the answer's `created`.
pub const CREATED: &str = "x-tidegate-created";

/// Milliseconds that the request may still take.
pub const DEADLINE_MS: &str = "x-tidegate-deadline-ms";

/// Who pays for the request, for fair sharing: the key's owner, or without keys the client's address. A node takes what it is given;
/// without it a request is `anonymous`'s.
pub const TENANT: &str = "x-tidegate-tenant";

/// Priority class of the request: `high`, `normal` or `low`; without it, `normal`.
pub const PRIORITY: &str = "x-tidegate-priority";

/// `1`: answer as a stream of events that carry their tokens, whatever the client asked for.
pub const STREAM: &str = "x-tidegate-stream";

/// `1`: another node had taken the request and was lost. It has been let in once, so a node does not refuse it for want of a place as it
/// refuses new ones, and lets it go before them.
pub const MOVED: &str = "x-tidegate-moved";

/// Fingerprint of the nodes that made what the client of a resumed stream has had; a node with another one refuses with 412.
pub const FINGERPRINT: &str = "x-tidegate-fingerprint";

/// Which node answered; in every answer that came from one.
pub const NODE: &str = "x-tidegate-node";
