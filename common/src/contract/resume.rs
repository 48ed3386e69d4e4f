//! How a stream is taken up by another node: the original body again, with the tokens that the client has had.

use serde::{Deserialize, Serialize};

/// The field `tidegate_resume` in a generation's body.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resume {
    /// Tokens already delivered, one list for each choice.
    pub tokens: Vec<Vec<u32>>,
}

impl Resume {
    /// Name of the field in the body.
    pub const FIELD: &'static str = "tidegate_resume";
}
