//! Calls of tools, as models write them: JSON objects with a name and arguments, behind an opening mark or at the beginning of the answer.
//!
//! A call's name is given out as soon as it is certain, its arguments as they come. What turns out to be no call is given out as text.

use serde_json::Value;

use super::{
    Piece,
    stop_strings::{first, undecided},
};

/// How a model writes its calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ToolFormat {
    /// `<tool_call>{"name", "arguments"}</tool_call>`, once for each call: Hermes, Qwen.
    Hermes,
    /// `<tool_call>[{"name", "arguments"}, ...]</tool_call>`: SmolLM2.
    HermesList,
    /// `{"name", "parameters"}` alone, or behind `<|python_tag|>`, several parted by `;`: Llama 3.
    Llama3,
    /// `[TOOL_CALLS][{"name", "arguments"}, ...]`: Mistral.
    Mistral,
    /// `[{"name", "arguments"}, ...]` alone.
    Json,
}

/// Which calls to look for.
#[derive(Debug, Clone)]
pub struct Tools {
    /// How they are written.
    pub format: ToolFormat,
    /// Names of the tools that there are.
    pub names: Vec<String>,
    /// Most calls of one answer; what comes beyond is dropped.
    pub calls_max: usize,
}

impl ToolFormat {
    /// What stands before a call, if anything must.
    pub fn open(self) -> Option<&'static str> {
        match self {
            Self::Hermes | Self::HermesList => Some("<tool_call>"),
            Self::Llama3 => Some("<|python_tag|>"),
            Self::Mistral => Some("[TOOL_CALLS]"),
            Self::Json => None,
        }
    }

    /// What stands after it.
    pub fn close(self) -> Option<&'static str> {
        matches!(self, Self::Hermes | Self::HermesList).then_some("</tool_call>")
    }

    /// Characters that may begin a call without a mark.
    fn bare(self) -> &'static [char] {
        match self {
            Self::Llama3 => &['{'],
            Self::Json => &['{', '['],
            _ => &[],
        }
    }

    /// The member that holds the arguments.
    pub fn arguments(self) -> &'static str {
        if self == Self::Llama3 { "parameters" } else { "arguments" }
    }
}

/// Looks for calls.
#[derive(Debug)]
pub(super) struct ToolCalls {
    format: ToolFormat,
    names: Vec<String>,
    state: State,
    held: String,
    any: bool,
}

#[derive(Debug)]
enum State {
    /// Nothing but blanks has come.
    Start,
    /// Words.
    Words,
    /// Between calls; `raw` is what has come since the opening mark, for as long as no call has.
    Between { raw: String, is_bare: bool },
    /// Within one.
    Within { call: Box<Call>, raw: String, is_bare: bool },
}

impl ToolCalls {
    pub(super) fn new(tools: &Tools) -> Self {
        Self { format: tools.format, names: tools.names.clone(), state: State::Start, held: String::new(), any: false }
    }

    pub(super) fn push(&mut self, text: &str, out: &mut Vec<Piece>) {
        self.held.push_str(text);
        while self.advance(out) {}
    }

    /// The text has ended.
    pub(super) fn finish(&mut self, out: &mut Vec<Piece>) {
        let rest = std::mem::take(&mut self.held);
        match std::mem::replace(&mut self.state, State::Words) {
            // blanks after a call say nothing
            State::Start | State::Words if self.any && rest.trim().is_empty() => {}
            State::Start | State::Words => out.push(Piece::Text(rest)),
            State::Between { raw, .. } if !self.any => out.push(Piece::Text(raw + &rest)),
            State::Within { call, raw, .. } if call.name.is_none() => out.push(Piece::Text(raw + &rest)),
            State::Between { .. } | State::Within { .. } => {}
        }
    }

    /// One move; false when more text is needed.
    fn advance(&mut self, out: &mut Vec<Piece>) -> bool {
        match &self.state {
            State::Start => self.leave_start(),
            State::Words => self.words(out),
            State::Between { .. } => self.between(out),
            State::Within { .. } => self.within(out),
        }
    }

    fn leave_start(&mut self) -> bool {
        let text = self.held.trim_start();
        let Some(c) = text.chars().next() else { return false };
        if self.format.bare().contains(&c) {
            let (blanks, rest) = self.held.split_at(self.held.len() - text.len());
            self.state = State::Between { raw: blanks.to_owned(), is_bare: true };
            self.held = rest.to_owned();
        } else {
            self.state = State::Words;
        }
        true
    }

    fn words(&mut self, out: &mut Vec<Piece>) -> bool {
        let open = self.format.open();
        let open = open.as_slice();
        if let Some((at, which)) = first(&self.held, open) {
            let mark = open[which];
            let rest = self.held.split_off(at + mark.len());
            let before = self.held[..at].trim_end();
            out.push(Piece::Text(before.to_owned()));
            // blanks and mark are text after all when no call follows
            self.state = State::Between { raw: self.held[before.len()..].to_owned(), is_bare: false };
            self.held = rest;
            return true;
        }
        // blanks are dropped before a call, so they wait for what comes after them
        let certain = self.held[..self.held.len() - undecided(&self.held, open)].trim_end().len();
        if certain > 0 {
            out.push(Piece::Text(self.held.drain(..certain).collect()));
        }
        false
    }

    fn between(&mut self, out: &mut Vec<Piece>) -> bool {
        let State::Between { raw, is_bare } = &mut self.state else { return false };
        let Some(c) = self.held.chars().next() else { return false };
        if c == '{' {
            self.state = State::Within { call: Box::default(), raw: std::mem::take(raw), is_bare: *is_bare };
            return true;
        }
        if let Some(close) = self.format.close() {
            if let Some(rest) = self.held.strip_prefix(close) {
                if !self.any {
                    out.push(Piece::Text(std::mem::take(raw) + close));
                }
                (self.held, self.state) = (rest.to_owned(), State::Words);
                return true;
            }
            if close.starts_with(self.held.as_str()) {
                return false;
            }
        }
        if c.is_whitespace() || "[],;".contains(c) {
            raw.push(c);
            self.held.drain(..c.len_utf8());
            return true;
        }
        // no call: the mark was text, unless calls have used it
        if !self.any {
            out.push(Piece::Text(std::mem::take(raw)));
        }
        self.state = State::Words;
        true
    }

    fn within(&mut self, out: &mut Vec<Piece>) -> bool {
        let State::Within { call, raw, is_bare } = &mut self.state else { return false };
        let Some(c) = self.held.chars().next() else { return false };
        let is_named = call.name.is_some();
        let step = call.take(c, out);
        if step != Step::Beyond {
            raw.push(c);
            self.held.drain(..c.len_utf8());
        }
        let known = |name: &String| !*is_bare || self.names.contains(name);
        if !is_named && call.name.as_ref().is_some_and(known) {
            call.announce(out);
            self.any = true;
        }
        let is_stray = *is_bare && !is_named && call.is_stray(&self.names);
        match step {
            Step::More if !is_stray => {}
            Step::Ended | Step::Beyond if call.announced => {
                call.close(out);
                self.state = State::Between { raw: String::new(), is_bare: *is_bare };
            }
            // an object that is no call
            _ => {
                out.push(Piece::Text(std::mem::take(raw)));
                self.state = State::Words;
            }
        }
        true
    }
}

/// One call's object, read character by character.
#[derive(Debug, Default)]
struct Call {
    depth: u32,
    in_string: bool,
    escaped: bool,
    part: Part,
    /// The key, once it is whole.
    key: String,
    /// What has come of the key or the value, if it must wait.
    text: String,
    name: Option<String>,
    announced: bool,
    /// Arguments that came before the name.
    early: Option<String>,
    has_arguments: bool,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Part {
    #[default]
    Key,
    /// A value that waits until it is whole.
    Value,
    /// Arguments that go out as they come.
    Flowing,
    /// A whole value has passed.
    After,
}

/// What a character has done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    More,
    /// The object is whole.
    Ended,
    /// The character belongs to no object.
    Beyond,
}

impl Call {
    fn take(&mut self, c: char, out: &mut Vec<Piece>) -> Step {
        let was_outside = !self.in_string;
        self.follow(c);
        if self.depth == 0 {
            if was_outside && c == '}' {
                self.end_value();
                return Step::Ended;
            }
            return Step::Beyond;
        }
        if was_outside && self.depth == 1 {
            match (self.part, c) {
                (Part::Key, '{') if self.text.is_empty() && self.key.is_empty() => return Step::More,
                (Part::Key, ':') => return self.end_key(),
                (Part::Value | Part::After, ',') => {
                    self.end_value();
                    self.part = Part::Key;
                    return Step::More;
                }
                (Part::Flowing, '}' | ']') => {
                    out.push(arguments_piece(c));
                    self.part = Part::After;
                    return Step::More;
                }
                (Part::Key, c) if !c.is_whitespace() && c != '"' && c != ',' => return Step::Beyond,
                (Part::After, c) if !c.is_whitespace() => return Step::Beyond,
                _ => {}
            }
        }
        match self.part {
            Part::Flowing => out.push(arguments_piece(c)),
            Part::Value if self.text.is_empty() && self.begins_flow(c) => {
                self.part = Part::Flowing;
                self.has_arguments = true;
                out.push(arguments_piece(c));
            }
            Part::Key | Part::Value if !c.is_whitespace() || !self.text.is_empty() => self.text.push(c),
            _ => {}
        }
        Step::More
    }

    /// Depth and strings.
    fn follow(&mut self, c: char) {
        match c {
            _ if self.escaped => self.escaped = false,
            '\\' if self.in_string => self.escaped = true,
            '"' => self.in_string = !self.in_string,
            '{' | '[' if !self.in_string => self.depth += 1,
            '}' | ']' if !self.in_string => self.depth = self.depth.saturating_sub(1),
            _ => {}
        }
    }

    fn begins_flow(&self, c: char) -> bool {
        self.announced && self.is_arguments() && matches!(c, '{' | '[')
    }

    fn is_arguments(&self) -> bool {
        matches!(self.key.as_str(), "arguments" | "parameters")
    }

    fn end_key(&mut self) -> Step {
        match serde_json::from_str(&std::mem::take(&mut self.text)) {
            Ok(key) => {
                (self.key, self.part) = (key, Part::Value);
                Step::More
            }
            Err(_) => Step::Beyond,
        }
    }

    fn end_value(&mut self) {
        let text = std::mem::take(&mut self.text);
        if self.part != Part::Value {
            return;
        }
        match self.key.as_str() {
            "name" => self.name = self.name.take().or_else(|| serde_json::from_str(&text).ok()),
            _ if self.is_arguments() => self.early = Some(arguments(text.trim_end())),
            _ => {}
        }
    }

    fn announce(&mut self, out: &mut Vec<Piece>) {
        self.announced = true;
        out.push(Piece::Call { index: 0, name: self.name.clone().unwrap_or_default() });
    }

    /// The object has ended: what is owed goes out.
    fn close(&mut self, out: &mut Vec<Piece>) {
        if !self.has_arguments {
            out.push(arguments_piece(self.early.take().unwrap_or_else(|| "{}".to_owned())));
        }
    }

    /// Whether an object without a mark cannot be a call.
    fn is_stray(&self, names: &[String]) -> bool {
        let is_foreign = !matches!(self.key.as_str(), "" | "name" | "arguments" | "parameters" | "type" | "id");
        is_foreign || self.name.as_ref().is_some_and(|name| !names.contains(name))
    }
}

/// Arguments of the newest call, whichever that is.
fn arguments_piece(json: impl Into<String>) -> Piece {
    Piece::Arguments { index: 0, json: json.into() }
}

/// Arguments that came in one piece; some models write them as a text of JSON.
fn arguments(value: &str) -> String {
    match serde_json::from_str(value) {
        Ok(Value::String(text)) => text,
        Ok(Value::Null) => "{}".into(),
        _ => value.to_owned(),
    }
}
