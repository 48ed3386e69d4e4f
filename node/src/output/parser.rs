//! The text of an answer, split into what clients are told apart: thoughts, words, and calls of tools.

use super::{
    reasoning::{Reasoning, Side},
    tool_calls::{ToolCalls, Tools},
};

/// A part of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Piece {
    /// Words of the answer.
    Text(String),
    /// Thoughts before it.
    Reasoning(String),
    /// A call of a tool begins.
    Call {
        /// Its place among the answer's calls.
        index: usize,
        /// The tool's name.
        name: String,
    },
    /// More of the newest call's arguments.
    Arguments {
        /// The call's place.
        index: usize,
        /// JSON text.
        json: String,
    },
}

/// Splits one choice's text as it comes.
#[derive(Debug)]
pub struct Parser {
    reasoning: Reasoning,
    tools: Option<ToolCalls>,
    calls: usize,
    calls_max: usize,
}

impl Parser {
    /// `thoughts`: whether to look for them, and whether the prompt ends within them. `tools`: which calls to look for.
    pub fn new(thoughts: Option<bool>, tools: Option<&Tools>) -> Self {
        Self {
            reasoning: thoughts.map_or_else(Reasoning::none, Reasoning::new),
            tools: tools.map(ToolCalls::new),
            calls: 0,
            calls_max: tools.map_or(0, |tools| tools.calls_max),
        }
    }

    /// Whether what comes now is thoughts.
    pub fn is_thinking(&self) -> bool {
        self.reasoning.is_inside()
    }

    /// Calls so far.
    pub fn calls(&self) -> usize {
        self.calls
    }

    /// Takes the next text; `is_last` when nothing comes after it.
    pub fn push(&mut self, text: &str, is_last: bool) -> Vec<Piece> {
        let mut found = Vec::new();
        let Self { reasoning, tools, .. } = self;
        let mut sort = |side: Side<'_>| match (side, tools.as_mut()) {
            (Side::Thoughts(text), _) => found.push(Piece::Reasoning(text.to_owned())),
            (Side::Answer(text), None) => found.push(Piece::Text(text.to_owned())),
            (Side::Answer(text), Some(tools)) => tools.push(text, &mut found),
        };
        reasoning.push(text, &mut sort);
        if is_last {
            reasoning.finish(&mut sort);
            if let Some(tools) = tools {
                tools.finish(&mut found);
            }
        }
        self.settle(found)
    }

    /// Joins neighbours of one kind, and drops calls beyond the most.
    fn settle(&mut self, found: Vec<Piece>) -> Vec<Piece> {
        let mut pieces: Vec<Piece> = Vec::with_capacity(found.len());
        for mut piece in found {
            match &mut piece {
                Piece::Call { index, .. } => {
                    *index = self.calls;
                    self.calls += 1;
                }
                Piece::Arguments { index, .. } => *index = self.calls.saturating_sub(1),
                Piece::Text(text) | Piece::Reasoning(text) if text.is_empty() => continue,
                _ => {}
            }
            let of_a_call = matches!(piece, Piece::Call { .. } | Piece::Arguments { .. });
            if of_a_call && self.calls > self.calls_max {
                continue;
            }
            join(&mut pieces, piece);
        }
        pieces
    }
}

/// Adds a piece to its neighbour, if they are of one kind.
fn join(pieces: &mut Vec<Piece>, piece: Piece) {
    match (pieces.last_mut(), &piece) {
        (Some(Piece::Text(a)), Piece::Text(b))
        | (Some(Piece::Reasoning(a)), Piece::Reasoning(b))
        | (Some(Piece::Arguments { json: a, .. }), Piece::Arguments { json: b, .. }) => a.push_str(b),
        _ => pieces.push(piece),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::output::ToolFormat;

    fn tools(format: ToolFormat) -> Tools {
        Tools { format, names: vec!["weather".into(), "time".into()], calls_max: 8 }
    }

    /// All pieces of a text that comes in these parts, neighbours joined.
    fn parse(mut parser: Parser, parts: &[&str]) -> Vec<Piece> {
        let mut all: Vec<Piece> = parts.iter().flat_map(|part| parser.push(part, false)).collect();
        all.extend(parser.push("", true));
        all.into_iter().fold(Vec::new(), |mut pieces, piece| {
            join(&mut pieces, piece);
            pieces
        })
    }

    fn one(format: ToolFormat, text: &str) -> Vec<Piece> {
        parse(Parser::new(None, Some(&tools(format))), &[text])
    }

    fn text(text: &str) -> Piece {
        Piece::Text(text.into())
    }

    fn call(index: usize, name: &str, arguments: &str) -> Vec<Piece> {
        vec![Piece::Call { index, name: name.into() }, Piece::Arguments { index, json: arguments.into() }]
    }

    #[test]
    fn every_format_gives_its_calls() {
        let two = [call(0, "weather", r#"{"city": "Bonn"}"#), call(1, "time", "{}")].concat();
        for (format, words) in [
            (
                ToolFormat::Hermes,
                "<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Bonn\"}}\n</tool_call>\n<tool_call>{\"arguments\": {}, \"name\": \"time\"}</tool_call>",
            ),
            (
                ToolFormat::HermesList,
                "<tool_call>[{\"name\": \"weather\", \"arguments\": {\"city\": \"Bonn\"}}, {\"name\": \"time\", \"arguments\": {}}]</tool_call>",
            ),
            (
                ToolFormat::Llama3,
                "<|python_tag|>{\"name\": \"weather\", \"parameters\": {\"city\": \"Bonn\"}}; {\"name\": \"time\", \"parameters\": {}}",
            ),
            (
                ToolFormat::Llama3,
                "{\"type\": \"function\", \"name\": \"weather\", \"parameters\": {\"city\": \"Bonn\"}};{\"name\": \"time\"}",
            ),
            (
                ToolFormat::Mistral,
                "[TOOL_CALLS] [{\"name\": \"weather\", \"arguments\": {\"city\": \"Bonn\"}}, {\"name\": \"time\", \"arguments\": {}}]",
            ),
            (
                ToolFormat::Json,
                " [{\"name\": \"weather\", \"arguments\": {\"city\": \"Bonn\"}}, {\"name\": \"time\", \"arguments\": {}}]",
            ),
        ] {
            assert_eq!(one(format, words), two, "{format:?}: {words}");
        }
    }

    #[test]
    fn what_is_no_call_stays_text() {
        for (format, words) in [
            (ToolFormat::Hermes, "a <tool_calls and {\"name\": 1} "),
            (ToolFormat::Hermes, "<tool_call>{\"city\": 1}"),
            (ToolFormat::Llama3, "{\"city\": \"Bonn\", \"name\": \"weather\"}"),
            (ToolFormat::Llama3, "{\"name\": \"Anna\", \"age\": 3}"),
            (ToolFormat::Llama3, "Here: {\"name\": \"weather\"}"),
            (ToolFormat::Json, "[1, 2]"),
            (ToolFormat::Mistral, "[TOOL_CALL"),
        ] {
            assert_eq!(one(format, words), [text(words)], "{format:?}");
        }
    }

    #[test]
    fn words_before_a_call_stay_and_blanks_around_it_go() {
        let found = one(
            ToolFormat::Hermes,
            "Let me see.\n\n<tool_call>\n{\"name\": \"time\", \"arguments\": {\"a\": \"}<\\\"{\"}}\n</tool_call>\n",
        );
        assert_eq!(found, [vec![text("Let me see.")], call(0, "time", r#"{"a": "}<\"{"}"#)].concat());
    }

    #[test]
    fn arguments_may_be_a_text_of_json_and_may_break_off() {
        let found = one(ToolFormat::Hermes, r#"<tool_call>{"name": "time", "arguments": "{\"a\": 1}"}</tool_call>"#);
        assert_eq!(found, call(0, "time", r#"{"a": 1}"#));
        let found = one(ToolFormat::Hermes, r#"<tool_call>{"name": "time", "arguments": {"a": [1"#);
        assert_eq!(found, call(0, "time", r#"{"a": [1"#));
    }

    #[test]
    fn calls_beyond_the_most_are_dropped() {
        let only = Tools { calls_max: 1, ..tools(ToolFormat::Json) };
        let found = parse(
            Parser::new(None, Some(&only)),
            &[r#"[{"name":"time","arguments":{}},{"name":"time","arguments":{}}]"#],
        );
        assert_eq!(found, call(0, "time", "{}"));
    }

    #[test]
    fn thoughts_are_told_from_the_answer() {
        let thoughts = |text: &str| Piece::Reasoning(text.into());
        let find = |is_open, words: &str| parse(Parser::new(Some(is_open), None), &[words]);
        assert_eq!(find(false, "\n<think>\n a b \n</think>\n\n c "), [thoughts("a b"), text("c ")]);
        assert_eq!(find(true, "a</think>b</think>"), [thoughts("a"), text("b</think>")]);
        assert_eq!(find(true, "a <b "), [thoughts("a <b")]);
        assert_eq!(find(false, "<think>\n\n</think>\n\nhi"), [text("hi")]);
        assert_eq!(find(false, " <thin ice"), [text(" <thin ice")]);
    }

    const FORMATS: [ToolFormat; 5] =
        [ToolFormat::Hermes, ToolFormat::HermesList, ToolFormat::Llama3, ToolFormat::Mistral, ToolFormat::Json];

    proptest! {
        /// Law: any cut of the text gives the same pieces; and a parser that has replayed a beginning goes on with exactly the rest.
        #[test]
        fn any_cut_gives_the_same(
            parts in prop::collection::vec(prop::sample::select(vec![
                "<think>", "</think>", "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>", "{\"name\": \"time\", ", "{",
                "\"arguments\": {\"a\": \"ü}\"}", "\"parameters\": ", "}", "[", "]", ",", ";", "\n", " ", "word", "\"", "\\", "<", "null",
            ]), 0..14),
            format in prop::sample::select(FORMATS.to_vec()), open: bool, cuts in prop::collection::vec(0usize..200, 0..12),
        ) {
            let words = parts.concat();
            let mut cuts: Vec<usize> = cuts.into_iter().filter(|cut| words.is_char_boundary(*cut)).collect();
            cuts.extend([0, words.len()]);
            cuts.sort_unstable();
            let pieces: Vec<&str> = cuts.windows(2).map(|pair| &words[pair[0]..pair[1]]).collect();
            let new = || Parser::new(Some(open), Some(&tools(format)));
            prop_assert_eq!(parse(new(), &pieces), parse(new(), &[&words]));
        }
    }
}
