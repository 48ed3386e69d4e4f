//! Tools that a model may or must call.

use serde::Deserialize;
use serde_json::{Value, json};
use tidegate_common::contract::ApiError;

use super::super::grammar::{CALLS_MAX, Calls};
use crate::output::{self, ToolFormat};

/// Most tools of a request.
const TOOLS_MAX: usize = 128;

/// Longest name of a tool, in bytes.
const NAME_BYTES_MAX: usize = 128;

/// One tool, as the OpenAI API writes it.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
pub(in crate::http) struct Tool {
    /// `function`
    #[serde(rename = "type")]
    kind: String,
    /// What can be called.
    function: Option<Function>,
}

/// A function that the model may call.
#[derive(Debug, Clone, Deserialize, utoipa::ToSchema)]
pub(in crate::http) struct Function {
    /// Letters, digits and `_-.:`.
    pub(in crate::http) name: String,
    /// What it is for.
    pub(in crate::http) description: Option<String>,
    /// JSON schema of its arguments.
    #[schema(value_type = Object)]
    pub(in crate::http) parameters: Option<Value>,
}

/// `tool_choice` of the OpenAI API.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
#[serde(untagged, expecting = "tool_choice must be none, auto, required, or an object that names a function")]
pub(in crate::http) enum ToolChoice {
    /// `none`, `auto` or `required`.
    Word(String),
    /// One tool by its name.
    Named {
        /// `function`
        #[serde(rename = "type")]
        _kind: String,
        /// The function, in chat completions.
        function: Option<Named>,
        /// The function's name, in responses.
        name: Option<String>,
    },
}

/// A function by its name.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
pub(in crate::http) struct Named {
    /// Its name.
    pub(in crate::http) name: String,
}

/// What is to be done with tools.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::http) enum Use {
    /// Nothing.
    None,
    /// What the model likes.
    Auto,
    /// At least one call.
    Required,
    /// A call of this one.
    Named(String),
}

/// The tools of a request.
#[derive(Debug)]
pub(in crate::http) struct Tools {
    functions: Vec<Function>,
    pub(in crate::http) usage: Use,
    parallel: bool,
}

impl Tool {
    /// The functions of a list of tools.
    ///
    /// # Errors
    /// When a tool is none.
    pub(in crate::http) fn functions(tools: Vec<Self>) -> Result<Vec<Function>, ApiError> {
        let function = |(i, tool): (usize, Self)| match (tool.kind.as_str(), tool.function) {
            ("function", Some(function)) => Ok(function),
            ("function", None) => Err(ApiError::invalid(format!("tools[{i}].function"), "a tool needs its function")),
            _ => Err(ApiError::invalid(format!("tools[{i}].type"), "only tools of type 'function' are supported")),
        };
        tools.into_iter().enumerate().map(function).collect()
    }
}

impl ToolChoice {
    pub(in crate::http) fn usage(self) -> Result<Use, ApiError> {
        match self {
            Self::Word(word) => match word.as_str() {
                "none" => Ok(Use::None),
                "auto" => Ok(Use::Auto),
                "required" => Ok(Use::Required),
                _ => Err(ApiError::invalid(
                    "tool_choice",
                    "tool_choice must be none, auto, required, or name a function",
                )),
            },
            Self::Named { function, name, .. } => {
                let name = function.map(|f| f.name).or(name);
                name.map(Use::Named)
                    .ok_or_else(|| ApiError::invalid("tool_choice.function", "tool_choice names no function"))
            }
        }
    }
}

impl Tools {
    /// Checked tools; none when there are none.
    ///
    /// # Errors
    /// When a name or a schema cannot be used, or a tool is to be called that is not there.
    pub(in crate::http) fn new(functions: Vec<Function>, usage: Use, parallel: bool) -> Result<Option<Self>, ApiError> {
        if functions.len() > TOOLS_MAX {
            let message = format!("{} tools are more than the {TOOLS_MAX} allowed", functions.len());
            return Err(ApiError::invalid("tools", message));
        }
        for (i, function) in functions.iter().enumerate() {
            let name = &function.name;
            let is_plain = name.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-.:".contains(&b));
            if name.is_empty() || name.len() > NAME_BYTES_MAX || !is_plain {
                let message = format!("a tool's name must have 1 to {NAME_BYTES_MAX} letters, digits and _-.:");
                return Err(ApiError::invalid(format!("tools[{i}].name"), message));
            }
            if function.parameters.as_ref().is_some_and(|p| !p.is_object() && !p.is_null()) {
                return Err(ApiError::invalid(
                    format!("tools[{i}].parameters"),
                    "parameters must be a JSON schema: an object",
                ));
            }
        }
        match &usage {
            Use::Named(name) if !functions.iter().any(|f| f.name == *name) => {
                Err(ApiError::invalid("tool_choice", "tool_choice names a function that 'tools' does not list"))
            }
            Use::Required if functions.is_empty() => {
                Err(ApiError::invalid("tool_choice", "tool_choice asks for a call, and 'tools' lists no tool"))
            }
            _ => Ok((!functions.is_empty()).then_some(Self { functions, usage, parallel })),
        }
    }

    /// Whether a call must be made.
    pub(in crate::http) fn is_forced(&self) -> bool {
        matches!(self.usage, Use::Required | Use::Named(_))
    }

    /// Whether calls may be made.
    pub(in crate::http) fn are_free(&self) -> bool {
        self.usage == Use::Auto
    }

    /// What the template is told; a model that may not call is told of no tools.
    pub(in crate::http) fn listed(&self) -> Vec<Value> {
        if self.usage == Use::None {
            return Vec::new();
        }
        let one = |f: &Function| {
            let mut function = json!({"name": f.name});
            if let Some(description) = &f.description {
                function["description"] = description.as_str().into();
            }
            function["parameters"] =
                f.parameters.clone().unwrap_or_else(|| json!({"type": "object", "properties": {}}));
            json!({"type": "function", "function": function})
        };
        self.functions.iter().map(one).collect()
    }

    fn calls_max(&self) -> usize {
        if self.parallel && !matches!(self.usage, Use::Named(_)) { CALLS_MAX } else { 1 }
    }

    /// What the grammar must know.
    pub(in crate::http) fn calls(&self, format: ToolFormat) -> Calls<'_> {
        let asked = |f: &&Function| !matches!(&self.usage, Use::Named(name) if *name != f.name);
        let nothing = || json!({"type": "object", "properties": {}, "additionalProperties": false});
        let schema = |f: &Function| f.parameters.clone().filter(|p| !p.is_null()).unwrap_or_else(nothing);
        let tools = self.functions.iter().filter(asked).map(|f| (f.name.as_str(), schema(f))).collect();
        Calls { format, tools, calls_max: self.calls_max() }
    }

    /// What the parser must know.
    pub(in crate::http) fn parser(&self, format: ToolFormat) -> output::Tools {
        let names = self.functions.iter().map(|f| f.name.clone()).collect();
        // calls that nothing bounds are all given out
        let calls_max = if self.parallel { usize::MAX } else { 1 };
        output::Tools { format, names, calls_max }
    }
}
