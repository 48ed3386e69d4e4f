//! A door for the fuzz targets below `fuzz/`; built for them alone.

use super::{
    ask::{Body, ChatRequest, CompletionRequest, MessagesRequest, QueryRequest, ResponsesRequest},
    check,
    shape::Head,
};

/// Reads a body as each API does, without a model; the status of each refusal.
pub fn body(bytes: &[u8]) -> Vec<u16> {
    let refused = [
        refusal::<ChatRequest>(bytes),
        refusal::<CompletionRequest>(bytes),
        refusal::<QueryRequest>(bytes),
        refusal::<ResponsesRequest>(bytes),
        refusal::<MessagesRequest>(bytes),
    ];
    refused.into_iter().flatten().collect()
}

fn refusal<T: Body>(bytes: &[u8]) -> Option<u16> {
    let head = Head { request: String::new(), created: 0, model: String::new(), fingerprint: String::new() };
    check::parse::<T>(bytes).and_then(|body| body.ask(head)).err().map(|error| error.status())
}
