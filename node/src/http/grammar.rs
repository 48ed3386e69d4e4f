//! The one grammar of an answer, from what a request holds it to, the calls that it may or must make, and the thoughts before it.

use serde_json::{Value, json};

use crate::{
    guide::{Grammar, with_blanks},
    output::ToolFormat,
};

/// Most calls of one answer that is held to a grammar; a small model would go on for ever.
pub(super) const CALLS_MAX: usize = 16;

/// Blanks between thoughts and answer.
const GAP: &str = r"/[ \n]{0,4}/";

/// Calls that an answer may or must make.
pub(super) struct Calls<'a> {
    /// How the model writes them.
    pub(super) format: ToolFormat,
    /// Name and JSON schema of the arguments of each tool.
    pub(super) tools: Vec<(&'a str, Value)>,
    /// Most calls.
    pub(super) calls_max: usize,
}

/// The grammar of an answer that is `answer`, or `calls`, or either of them, after thoughts where the model has them: `Some(true)` when
/// the prompt ends within them. `token_of` names the token of a mark that is no text. A grammar of the client's own making is taken as it
/// is, so an answer held to it has no thoughts.
pub(super) fn compose(
    answer: Option<&Grammar>,
    calls: Option<&Calls<'_>>,
    thoughts: Option<bool>,
    token_of: &dyn Fn(&str) -> Option<u32>,
) -> Option<Grammar> {
    if (calls.is_none() && thoughts.is_none()) || matches!(answer, Some(Grammar::Lark(_))) {
        return answer.cloned();
    }
    let mark = |text: &str| token_of(text).map_or_else(|| quoted(text), |token| format!("<[{token}]>"));
    let mut rules = Vec::new();
    let mut bodies = Vec::new();
    if let Some(answer) = answer {
        rules.push(format!("answer: {}", answer_rule(answer)));
        bodies.push("answer");
    }
    if let Some(calls) = calls {
        rules.extend(call_rules(calls, &mark));
        bodies.push("calls");
    }
    let body = bodies.join(" | ");
    let start = match thoughts {
        None => format!("start: {body}"),
        Some(is_open) => {
            rules.push(format!("body: {body}"));
            // a mark that is a token of its own ends any text before it; one that is text must be looked for
            rules.push(match token_of("</think>") {
                Some(token) => format!("thoughts: /(.|\\n)*/ <[{token}]> {GAP}"),
                None => format!("thoughts: thought {GAP}\nthought[lazy]: /(.|\\n)*<\\/think>/"),
            });
            let open = mark("<think>");
            if is_open { "start: thoughts body".into() } else { format!("start: ({open} thoughts)? body") }
        }
    };
    Some(Grammar::Lark(std::iter::once(start).chain(rules).collect::<Vec<_>>().join("\n")))
}

fn answer_rule(answer: &Grammar) -> String {
    match answer {
        Grammar::JsonObject => format!("%json {}", with_blanks(json!({"type": "object"}))),
        Grammar::JsonSchema(schema) => format!("%json {}", with_blanks(schema.clone())),
        Grammar::Regex(regex) => format!("/{}/", regex.replace("\\/", "/").replace('/', "\\/")),
        Grammar::Choice(choices) => choices.iter().map(|choice| quoted(choice)).collect::<Vec<_>>().join(" | "),
        Grammar::Lark(lark) => lark.clone(),
    }
}

fn call_rules(calls: &Calls<'_>, mark: &dyn Fn(&str) -> String) -> Vec<String> {
    let format = calls.format;
    let more = |separator: &str, rule: &str| match calls.calls_max.saturating_sub(1) {
        0 => String::new(),
        more => format!(" ({} {rule}){{0,{more}}}", quoted(separator)),
    };
    let (open, close) = (format.open().map(mark).unwrap_or_default(), format.close().map(mark).unwrap_or_default());
    let mut rules = match format {
        ToolFormat::Hermes => vec![
            format!("calls: tagged{}", more("\n", "tagged")),
            format!("tagged: {open} {} call {} {close}", quoted("\n"), quoted("\n")),
        ],
        ToolFormat::Llama3 => vec![format!("calls: call{}", more("; ", "call"))],
        ToolFormat::HermesList | ToolFormat::Mistral | ToolFormat::Json => {
            vec![format!("calls: {open} \"[\" call{} \"]\" {close}", more(", ", "call"))]
        }
    };
    let names: Vec<String> = (0..calls.tools.len()).map(|i| format!("call_{i}")).collect();
    rules.push(format!("call: {}", names.join(" | ")));
    for (i, (name, schema)) in calls.tools.iter().enumerate() {
        let head = format!("{{\"name\": {}, \"{}\": ", quoted(name), format.arguments());
        rules.push(format!("call_{i}: {} arguments_{i} \"}}\"", quoted(&head)));
        rules.push(format!("arguments_{i}: %json {}", as_python_writes(schema.clone())));
    }
    rules
}

/// Models have learned calls as Python's `json.dumps` writes them; and a grammar without a choice of blanks cannot be stuck in them.
fn as_python_writes(mut schema: Value) -> Value {
    if let Some(object) = schema.as_object_mut() {
        let blanks = json!({"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": false});
        object.entry("x-guidance").or_insert(blanks);
    }
    schema
}

fn quoted(text: &str) -> String {
    Value::from(text).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        guide::tests::{guides, write},
        output::{Parser, Piece, Tools},
    };

    const FORMATS: [ToolFormat; 5] =
        [ToolFormat::Hermes, ToolFormat::HermesList, ToolFormat::Llama3, ToolFormat::Mistral, ToolFormat::Json];

    fn schema() -> Value {
        json!({"type": "object", "properties": {"city": {"$ref": "#/$defs/city"}}, "required": ["city"], "additionalProperties": false, "$defs": {"city": {"enum": ["Bonn", "Rome"]}}})
    }

    fn calls(format: ToolFormat, calls_max: usize) -> Calls<'static> {
        Calls {
            format,
            tools: vec![
                ("weather", schema()),
                ("now", json!({"type": "object", "properties": {}, "additionalProperties": false})),
            ],
            calls_max,
        }
    }

    /// What a model would write under the grammar that wants to say `wish`.
    fn written(grammar: Option<&Grammar>, wish: &str) -> String {
        let (guides, tokenizer) = guides();
        write(&mut guides.compile(grammar.expect("there is a grammar")).unwrap(), &tokenizer, wish)
    }

    fn parse(text: &str, format: ToolFormat) -> Vec<Piece> {
        let tools = Tools { format, names: vec!["weather".into(), "now".into()], calls_max: CALLS_MAX };
        Parser::new(None, Some(&tools)).push(text, true)
    }

    #[test]
    fn what_a_forced_call_may_be_is_what_the_parser_finds() {
        for format in FORMATS {
            let grammar = compose(None, Some(&calls(format, 1)), None, &|_| None);
            let text = written(grammar.as_ref(), "I think weather in Rome is fine");
            let found = parse(&text, format);
            let [Piece::Call { index: 0, name }, Piece::Arguments { json, .. }] = &found[..] else {
                panic!("{format:?}: {text} gives {found:?}")
            };
            let arguments: Value = serde_json::from_str(json).unwrap();
            assert!(name == "weather" || (name == "now" && arguments == json!({})), "{text}");
        }
    }

    #[test]
    fn an_answer_of_json_may_be_a_call_instead() {
        let answer = Grammar::JsonSchema(
            json!({"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"], "additionalProperties": false}),
        );
        let grammar = compose(Some(&answer), Some(&calls(ToolFormat::Hermes, 1)), None, &|_| None);
        assert_eq!(written(grammar.as_ref(), "{\"ok\":true}"), "{\"ok\":true}");
        let call = "<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Rome\"}}\n</tool_call>";
        assert_eq!(written(grammar.as_ref(), call), call);
    }

    #[test]
    fn thoughts_stand_before_an_answer_that_is_held() {
        let answer = Grammar::Choice(vec!["yes".into(), "no".into()]);
        let open = compose(Some(&answer), None, Some(true), &|_| None);
        assert_eq!(written(open.as_ref(), "so < or not?</think>\nno"), "so < or not?</think>\nno");
        let closed = compose(Some(&answer), None, Some(false), &|_| None);
        assert_eq!(written(closed.as_ref(), "<think>hm</think>yes"), "<think>hm</think>yes");
        assert_eq!(written(closed.as_ref(), "no"), "no");
        assert_eq!(compose(Some(&answer), None, None, &|_| None), Some(answer));
    }
}
