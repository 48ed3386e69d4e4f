//! `POST /v1/embeddings`: vectors for texts, from the hidden states of the model after its last layer.

use std::{sync::Arc, time::Duration};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use serde::Deserialize;
use serde_json::{Value, json};
use tidegate_common::contract::ApiError;
use tokio::sync::oneshot;

use super::{
    App, answer,
    ask::Prompts,
    check,
    frame::Frame,
    once::{Begun, Question},
};
use crate::{
    engine::{Generation, Pooling, Refused, Tokens, Wants},
    record::Outcome,
    sample::Sampling,
    sched::Owner,
    served::Loaded,
    stop::StopRule,
};

/// Most texts of a request.
const INPUTS_MAX: usize = 2048;

/// How often a place for the next texts is looked for.
const RETRY: Duration = Duration::from_millis(20);

/// Texts to make vectors of.
#[derive(Debug, Deserialize, utoipa::ToSchema)]
pub(super) struct EmbeddingsRequest {
    /// A text, several, or their tokens; up to 2048.
    #[schema(required)]
    input: Option<Prompts>,
    /// The model's name, as `GET /v1/models` lists it.
    #[schema(example = "smollm2-135m")]
    model: Option<String>,
    /// `float`, or `base64` of little-endian 32-bit floats.
    #[schema(example = "float")]
    encoding_format: Option<String>,
    /// Keeps this many numbers of each vector, scaled to length 1 again.
    #[schema(minimum = 1, example = 64)]
    dimensions: Option<i64>,
    /// Who asks; accepted, and not looked at.
    #[schema(example = "someone")]
    #[serde(rename = "user")]
    _user: Option<String>,
}

/// A checked request.
struct Texts {
    inputs: Vec<Vec<u32>>,
    pooling: Pooling,
    dimensions: Option<usize>,
    base64: bool,
}

/// A text that the engine works on.
struct Pending {
    _tokens: Tokens,
    vector: oneshot::Receiver<Vec<f32>>,
}

impl Question for EmbeddingsRequest {
    fn model(&self) -> Option<&str> {
        self.model.as_deref()
    }

    fn begin(self, app: &App, loaded: &Arc<Loaded>, frame: &Frame) -> Result<Begun, ApiError> {
        let texts = self.check(app, loaded)?;
        let window = app.config.request.choices_max;
        let first = begin(loaded, &frame.owner, texts.inputs.iter().take(window), texts.pooling);
        let first = first.map_err(|refused| answer::refusal(refused, app, loaded))?;
        let prompt_tokens = texts.inputs.iter().map(Vec::len).sum();
        Ok(Begun { prompt_tokens, work: Box::pin(run(loaded.clone(), frame.owner.clone(), texts, first, window)) })
    }
}

impl EmbeddingsRequest {
    fn check(self, app: &App, loaded: &Loaded) -> Result<Texts, ApiError> {
        let Some(pooling) = app.config.embeddings else {
            return Err(check::unsupported("input", "this node serves no embeddings; node.embeddings turns them on"));
        };
        let input = self.input.ok_or_else(|| check::missing("input"))?;
        if input.count() == 0 || input.count() > INPUTS_MAX {
            let message = format!("input has {} texts and must have 1 to {INPUTS_MAX}", input.count());
            return Err(ApiError::invalid("input", message));
        }
        let base64 = match self.encoding_format.as_deref() {
            None | Some("float") => false,
            Some("base64") => true,
            Some(_) => {
                let message = "encoding_format must be float or base64";
                return Err(ApiError::invalid("encoding_format", message));
            }
        };
        let width = loaded.width as i64;
        let dimensions = match self.dimensions {
            None => None,
            asked => Some(check::whole("dimensions", asked, 1..=width, width)? as usize),
        };
        let inputs = input.tokens("input", loaded)?;
        for tokens in &inputs {
            check::fits("input", tokens, 0, loaded)?;
        }
        Ok(Texts { inputs, pooling, dimensions, base64 })
    }
}

/// Gives texts to the engine.
fn begin<'a>(
    loaded: &Loaded,
    owner: &Owner,
    inputs: impl Iterator<Item = &'a Vec<u32>>,
    pooling: Pooling,
) -> Result<Vec<Pending>, Refused> {
    let (mut generations, mut vectors) = (Vec::new(), Vec::new());
    for (i, tokens) in inputs.enumerate() {
        let (sender, vector) = oneshot::channel();
        vectors.push(vector);
        generations.push(Generation {
            tokens: tokens.clone(),
            prompt_len: tokens.len(),
            choice: i as u32,
            sampling: Sampling::greedy(0),
            stop: StopRule { end_tokens: [].into(), tokens_max: 0 },
            guide: None,
            logprobs: None,
            is_moved: false,
            wants: Wants { embedding: Some((pooling, sender)), ..Wants::default() },
        });
    }
    let tokens = loaded.engine.submit(owner, generations)?;
    Ok(tokens.into_iter().zip(vectors).map(|(tokens, vector)| Pending { _tokens: tokens, vector }).collect())
}

/// Computes window after window, so that a long list leaves places to others.
async fn run(
    loaded: Arc<Loaded>,
    owner: Owner,
    texts: Texts,
    first: Vec<Pending>,
    window: usize,
) -> Result<Value, Outcome> {
    let mut data = Vec::with_capacity(texts.inputs.len());
    let mut pending = first;
    loop {
        for Pending { vector, _tokens } in pending {
            let vector = vector.await.map_err(|_| Outcome::EngineLost)?;
            let embedding = encoded(&unit(vector, texts.dimensions), texts.base64);
            data.push(json!({"object": "embedding", "index": data.len(), "embedding": embedding}));
        }
        if data.len() == texts.inputs.len() {
            break;
        }
        pending = loop {
            match begin(&loaded, &owner, texts.inputs[data.len()..].iter().take(window), texts.pooling) {
                Ok(pending) => break pending,
                Err(Refused::Full | Refused::TenantFull) => tokio::time::sleep(RETRY).await,
                Err(Refused::Dead) => return Err(Outcome::EngineLost),
            }
        };
    }
    let tokens: usize = texts.inputs.iter().map(Vec::len).sum();
    let usage = json!({"prompt_tokens": tokens, "total_tokens": tokens});
    Ok(json!({"object": "list", "data": data, "model": loaded.name, "usage": usage}))
}

/// The first `dimensions` numbers, scaled to length 1.
fn unit(mut vector: Vec<f32>, dimensions: Option<usize>) -> Vec<f32> {
    vector.truncate(dimensions.unwrap_or(vector.len()));
    let length = vector.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
    if length > 0.0 {
        vector.iter_mut().for_each(|x| *x = (f64::from(*x) / length) as f32);
    }
    vector
}

fn encoded(vector: &[f32], base64: bool) -> Value {
    if !base64 {
        return vector.into();
    }
    let bytes: Vec<u8> = vector.iter().flat_map(|x| x.to_le_bytes()).collect();
    BASE64_STANDARD.encode(bytes).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vectors_have_length_one_also_when_they_are_cut() {
        assert_eq!(unit(vec![3.0, 4.0], None), [0.6, 0.8]);
        assert_eq!(unit(vec![3.0, 4.0, 12.0], Some(2)), [0.6, 0.8]);
        assert_eq!(unit(vec![0.0, 0.0], None), [0.0, 0.0]);
    }

    #[test]
    fn base64_is_that_of_little_endian_floats() {
        assert_eq!(encoded(&[1.0, -2.0], true), json!("AACAPwAAAMA="));
        assert_eq!(encoded(&[1.0, -2.0], false), json!([1.0, -2.0]));
    }
}
