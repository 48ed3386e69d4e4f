//! Names of tensors: Hugging Face's to GGUF's.

use super::config::Family;

/// Where a tensor goes.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// To this name.
    Whole(String),
    /// The head, unless it is the embedding.
    Head,
    /// To this part of this layer.
    Layer(usize, String),
    /// To this part of this layer, as the matrix of this expert.
    Expert(usize, usize, &'static str),
    /// Known, and not needed.
    Ignored,
    /// To nowhere that we know.
    Unknown,
}

/// What a tensor of Hugging Face's name is to us.
pub(super) fn place(family: Family, name: &str) -> Place {
    if family == Family::Gemma3 && ["vision_tower.", "multi_modal_projector."].iter().any(|part| name.contains(part)) {
        return Place::Ignored;
    }
    // the text part of a model that sees: two layouts are about
    let name = name.strip_prefix("language_model.").unwrap_or(name);
    let inner = name.strip_prefix("model.").unwrap_or(name);
    let inner = inner.strip_prefix("language_model.").unwrap_or(inner);
    match inner {
        "embed_tokens.weight" => return Place::Whole("token_embd.weight".to_owned()),
        "norm.weight" => return Place::Whole("output_norm.weight".to_owned()),
        "lm_head.weight" => return Place::Head,
        _ => {}
    }
    let layer = inner.strip_prefix("layers.").and_then(|rest| rest.split_once('.'));
    match layer.and_then(|(number, part)| Some((index(number)?, part))) {
        Some((layer, part)) => in_layer(family, layer, part),
        None => Place::Unknown,
    }
}

fn in_layer(family: Family, layer: usize, part: &str) -> Place {
    if part.ends_with("rotary_emb.inv_freq") {
        return Place::Ignored;
    }
    if let Some(rest) = part.strip_prefix("mlp.experts.") {
        let found = rest.split_once('.').and_then(|(number, part)| Some((index(number)?, expert_part(part)?)));
        return found.map_or(Place::Unknown, |(expert, part)| Place::Expert(layer, expert, part));
    }
    let (base, kind) = part.rsplit_once('.').unwrap_or((part, ""));
    let place = match (layer_part(family, base), kind) {
        (Some(place), "weight") => place,
        (Some(place), "bias") if !place.ends_with("_norm") && place != "ffn_gate_inp" => place,
        _ => return Place::Unknown,
    };
    Place::Layer(layer, format!("{place}.{kind}"))
}

fn layer_part(family: Family, base: &str) -> Option<&'static str> {
    let is_gemma = family == Family::Gemma3;
    Some(match base {
        "input_layernorm" => "attn_norm",
        "post_attention_layernorm" if is_gemma => "post_attention_norm",
        "pre_feedforward_layernorm" if is_gemma => "ffn_norm",
        "post_feedforward_layernorm" if is_gemma => "post_ffw_norm",
        "post_attention_layernorm" => "ffn_norm",
        "self_attn.q_proj" => "attn_q",
        "self_attn.k_proj" => "attn_k",
        "self_attn.v_proj" => "attn_v",
        "self_attn.qkv_proj" => "attn_qkv",
        "self_attn.o_proj" => "attn_output",
        "self_attn.q_norm" => "attn_q_norm",
        "self_attn.k_norm" => "attn_k_norm",
        "mlp.gate_proj" => "ffn_gate",
        "mlp.up_proj" | "mlp.gate_up_proj" => "ffn_up",
        "mlp.down_proj" => "ffn_down",
        "mlp.gate" => "ffn_gate_inp",
        _ => return None,
    })
}

fn expert_part(part: &str) -> Option<&'static str> {
    Some(match part {
        "gate_proj.weight" => "ffn_gate_exps.weight",
        "up_proj.weight" => "ffn_up_exps.weight",
        "down_proj.weight" => "ffn_down_exps.weight",
        _ => return None,
    })
}

/// A number as it is always written: digits, without sign or leading zero.
fn index(text: &str) -> Option<usize> {
    let number: usize = text.parse().ok()?;
    (number.to_string() == text).then_some(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_family_s_names_have_their_places() {
        let layer = |part: &str| Place::Layer(7, part.to_owned());
        let cases = [
            (Family::Llama, "model.embed_tokens.weight", Place::Whole("token_embd.weight".into())),
            (Family::Llama, "lm_head.weight", Place::Head),
            (Family::Llama, "model.layers.7.post_attention_layernorm.weight", layer("ffn_norm.weight")),
            (Family::Gemma3, "model.layers.7.post_attention_layernorm.weight", layer("post_attention_norm.weight")),
            (Family::Gemma3, "language_model.model.layers.7.mlp.up_proj.weight", layer("ffn_up.weight")),
            (Family::Gemma3, "model.language_model.layers.7.mlp.up_proj.weight", layer("ffn_up.weight")),
            (Family::Gemma3, "vision_tower.vision_model.head.weight", Place::Ignored),
            (Family::Phi3, "model.layers.7.self_attn.qkv_proj.weight", layer("attn_qkv.weight")),
            (Family::Phi3, "model.layers.7.mlp.gate_up_proj.weight", layer("ffn_up.weight")),
            (Family::Qwen2, "model.layers.7.self_attn.q_proj.bias", layer("attn_q.bias")),
            (Family::Llama, "model.layers.7.mlp.down_proj.bias", layer("ffn_down.bias")),
            (
                Family::Qwen3Moe,
                "model.layers.7.mlp.experts.11.down_proj.weight",
                Place::Expert(7, 11, "ffn_down_exps.weight"),
            ),
        ];
        for (family, name, expected) in cases {
            assert_eq!(place(family, name), expected, "{name}");
        }
    }

    /// A tensor that would be left out of the computation makes a wrong model.
    #[test]
    fn what_no_architecture_of_ours_reads_is_unknown() {
        for (family, name) in [
            (Family::Llama, "model.layers.0.input_layernorm.bias"),
            (Family::Qwen3Moe, "model.layers.0.mlp.gate.bias"),
            (Family::Llama, "model.layers.01.mlp.up_proj.weight"),
            (Family::Llama, "model.layers.-1.mlp.up_proj.weight"),
            (Family::Llama, "model.layers.0.mlp.up_proj.lora_A"),
            (Family::Llama, "vision_tower.x"),
            (Family::Llama, "score.weight"),
            (Family::Qwen3Moe, "model.layers.0.mlp.experts.gate_up_proj"),
        ] {
            assert_eq!(place(family, name), Place::Unknown, "{name}");
        }
    }
}
