//! The fields that chat and text completions share. A macro and not a flattened struct: serde forgets the path of what it flattens, and
//! refusals name their field.

/// Defines a request with its own fields and the shared ones, and a method that takes the shared ones out.
macro_rules! openai_request {
    ($(#[$meta:meta])* $name:ident { $($(#[$field_meta:meta])* $field:ident: $type:ty,)* }) => {
        $(#[$meta])*
        #[derive(Debug, serde::Deserialize, utoipa::ToSchema)]
        pub(in crate::http) struct $name {
            $($(#[$field_meta])* $field: $type,)*
            /// The model's name, as `GET /v1/models` lists it.
            #[schema(example = "smollm2-135m")]
            model: Option<String>,
            /// 0 always takes the likeliest token.
            #[schema(minimum = 0, maximum = 2, example = 0.7)]
            temperature: Option<f64>,
            /// Smallest set of tokens whose probability reaches this.
            #[schema(minimum = 0, maximum = 1, example = 0.9)]
            top_p: Option<f64>,
            /// Most tokens to choose from; 0 or -1 for all.
            #[schema(minimum = -1, maximum = 1000000, example = 40)]
            top_k: Option<i64>,
            /// Tokens less likely than this share of the likeliest are dropped.
            #[schema(minimum = 0, maximum = 1, example = 0.05)]
            min_p: Option<f64>,
            /// The same seed gives the same answer.
            #[schema(example = 7)]
            seed: Option<i64>,
            /// Most tokens of the answer.
            #[schema(minimum = 1, example = 16)]
            max_tokens: Option<i64>,
            /// How many answers; `node.max_choices` sets the most.
            #[schema(minimum = 1, example = 1)]
            n: Option<i64>,
            /// Texts that end the answer and are not part of it: up to 16.
            stop: Option<super::OneOrMany>,
            /// Whether the answer comes as events.
            #[schema(example = false)]
            stream: Option<bool>,
            /// Details of the stream.
            stream_options: Option<super::StreamOptions>,
            /// Taken from the logit of a token that was said.
            #[schema(minimum = -2, maximum = 2, example = 0.5)]
            presence_penalty: Option<f64>,
            /// Taken for each time it was said.
            #[schema(minimum = -2, maximum = 2, example = 0.5)]
            frequency_penalty: Option<f64>,
            /// Divides the logits of tokens that were said, in the prompt too.
            #[schema(minimum = 0.01, maximum = 100, example = 1.1)]
            repetition_penalty: Option<f64>,
            /// Token ids to what is added to their logits, from -100 to 100.
            #[schema(value_type = Option<Object>)]
            logit_bias: Option<std::collections::BTreeMap<String, f64>>,
            /// Goes on after the model's end tokens.
            #[schema(example = false)]
            ignore_eos: Option<bool>,
            /// Who asks; accepted, and not looked at.
            #[schema(example = "someone")]
            #[serde(rename = "user")]
            _user: Option<String>,
            /// What the answer must be.
            response_format: Option<super::held::ResponseFormat>,
            /// A JSON schema that the answer must fit.
            #[schema(value_type = Option<Object>)]
            guided_json: Option<serde_json::Value>,
            /// A regular expression that the whole answer must match.
            #[schema(example = "[0-9]{1,3}")]
            guided_regex: Option<String>,
            /// The answer is one of these.
            #[schema(example = json!(["yes", "no"]))]
            guided_choice: Option<Vec<String>>,
            /// A grammar in Lark's notation.
            #[schema(example = "start: \"yes\" | \"no\"")]
            guided_grammar: Option<String>,
            /// The `guided_` fields in one object, as newer vLLM writes them.
            structured_outputs: Option<super::held::StructuredOutputs>,
            /// Between balancer and node.
            #[schema(ignore)]
            tidegate_resume: Option<tidegate_common::contract::Resume>,
        }

        impl $name {
            /// What an answer is held to.
            fn held(&mut self) -> Result<Option<super::Held>, tidegate_common::contract::ApiError> {
                let wishes = super::held::Wishes {
                    response_format: self.response_format.take(),
                    guided_json: self.guided_json.take(),
                    guided_regex: self.guided_regex.take(),
                    guided_choice: self.guided_choice.take(),
                    guided_grammar: self.guided_grammar.take(),
                    structured_outputs: self.structured_outputs.take(),
                };
                wishes.held()
            }

            /// How tokens are chosen.
            fn knobs(&mut self) -> super::Knobs {
                super::Knobs {
                    temperature: self.temperature,
                    top_p: self.top_p,
                    top_k: self.top_k,
                    min_p: self.min_p,
                    seed: self.seed,
                    presence_penalty: self.presence_penalty,
                    frequency_penalty: self.frequency_penalty,
                    repetition_penalty: self.repetition_penalty,
                    logit_bias: self.logit_bias.take(),
                    n: self.n,
                    ignore_eos: self.ignore_eos,
                    stops: self.stop.take().map(|stop| ("stop", stop.texts())),
                    tokens_max: self.max_tokens.map(|most| ("max_tokens", most)),
                }
            }

            fn include_usage(&self) -> bool {
                self.stream_options.as_ref().and_then(|options| options.include_usage).unwrap_or(false)
            }
        }
    };
}

pub(super) use openai_request;
