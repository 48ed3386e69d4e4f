//! One choice of an answer: each token becomes a [`Step`], what it has brought. Pure: a choice that has taken the same tokens is in the
//! same state, on whichever node, so a stream is taken up by taking its tokens again and throwing the steps away.

use std::sync::Arc;

use crate::{
    output::{self, Parser, Piece, Text},
    sample::Logprobs,
    stop::Finish,
    text::Tokenizer,
};

/// What all choices of a request share.
pub(super) struct Plan {
    pub(super) tokenizer: Arc<Tokenizer>,
    /// Tokens that end the answer; none under `ignore_eos`.
    pub(super) end_tokens: Arc<[u32]>,
    pub(super) stops: Vec<String>,
    /// Control tokens that count as text, because a parser looks for them.
    pub(super) marks: Vec<(u32, &'static str)>,
    /// Whether thoughts are looked for, and whether the prompt ends within them.
    pub(super) thoughts: Option<bool>,
    pub(super) tools: Option<output::Tools>,
    /// Whether each token's log-probability is told.
    pub(super) scores: bool,
    /// Whether they are kept for a whole answer.
    pub(super) keeps_scores: bool,
    /// Whether the answer begins with the prompt.
    pub(super) echo: bool,
}

/// What one token has brought.
#[derive(Debug, Default)]
pub(super) struct Step {
    pub(super) choice: u32,
    /// Whether it is the choice's first.
    pub(super) opens: bool,
    pub(super) pieces: Vec<Piece>,
    /// Each newly told token, when they are.
    pub(super) scored: Option<Vec<Scored>>,
    pub(super) ended: Option<Why>,
}

/// Why a choice ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Why {
    /// The model's end token.
    Stop,
    /// A stop string: this one.
    StopString(String),
    /// `max_tokens`, or the end of the context.
    Length,
    /// It calls tools.
    ToolCalls,
}

impl Why {
    /// The same in the two words that metrics tell apart.
    pub(super) fn finish(&self) -> Finish {
        match self {
            Self::Stop | Self::StopString(_) | Self::ToolCalls => Finish::Stop,
            Self::Length => Finish::Length,
        }
    }
}

/// A token and how likely it was.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Scored {
    pub(super) token: Spelled,
    /// None for the first token of a prompt.
    pub(super) logprob: Option<f32>,
    /// The likeliest, likelier first.
    pub(super) top: Vec<(Spelled, f32)>,
    /// Characters of the text before it.
    pub(super) offset: usize,
}

/// A token as people read it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Spelled {
    pub(super) text: String,
    pub(super) bytes: Vec<u8>,
}

/// A choice so far, or as a whole.
#[derive(Debug, Default)]
pub(super) struct Said {
    pub(super) text: String,
    pub(super) reasoning: String,
    /// Names and arguments.
    pub(super) calls: Vec<(String, String)>,
    pub(super) scored: Option<Vec<Scored>>,
    pub(super) ended: Option<Why>,
    pub(super) tokens: u32,
    /// How many of them were thoughts.
    pub(super) tokens_reasoning: u32,
}

/// One choice.
pub(super) struct Choice {
    index: u32,
    plan: Arc<Plan>,
    text: Text,
    parser: Parser,
    said: Said,
    prompt: Vec<u32>,
    had: Vec<u32>,
    /// Whether a blank before the next text is the tokenizer's own, and no part of the answer.
    drops_blank: bool,
    /// Characters so far, the echoed prompt's too.
    chars: usize,
    /// What is told before the next step.
    front: Vec<Scored>,
}

impl Choice {
    pub(super) fn new(index: u32, plan: Arc<Plan>, prompt: &[u32]) -> Self {
        let mut choice = Self {
            index,
            text: Text::new(&plan.stops),
            parser: Parser::new(plan.thoughts, plan.tools.as_ref()),
            said: Said { scored: plan.scores.then(Vec::new), ..Said::default() },
            prompt: if plan.echo { prompt.to_vec() } else { Vec::new() },
            had: Vec::new(),
            drops_blank: plan.tokenizer.drops_blank_after(prompt),
            chars: 0,
            front: Vec::new(),
            plan,
        };
        if choice.plan.echo {
            let bytes = choice.plan.tokenizer.text_bytes(&choice.prompt);
            choice.chars = chars(&bytes);
            choice.said.text = String::from_utf8_lossy(&bytes).into_owned();
        }
        choice
    }

    /// Takes the next token.
    pub(super) fn take(&mut self, token: u32, logprobs: Option<&Logprobs>, finish: Option<Finish>) -> Step {
        let opens = self.text.tokens() == 0;
        self.said.tokens_reasoning += u32::from(self.parser.is_thinking());
        let (plan, mut fresh) = (Arc::clone(&self.plan), String::new());
        let bytes = self.without_blank(plan.bytes(token));
        self.text.push(bytes, finish, &mut fresh);
        let ended = self.text.finish();
        let mut step = Step { choice: self.index, opens, ..self.begin(opens) };
        step.pieces.extend(self.parser.push(&fresh, ended.is_some()));
        if let (Some(scored), Some(logprobs)) = (&mut step.scored, logprobs)
            && !self.plan.end_tokens.contains(&token)
        {
            scored.push(self.plan.scored(token, Some(logprobs), self.chars));
        }
        self.chars += chars(bytes);
        step.ended = ended.map(|finish| self.why(finish));
        self.keep(&step);
        step
    }

    /// A token's bytes; of the first ones of all, what a detokenizer of the whole would give.
    fn without_blank<'a>(&mut self, bytes: &'a [u8]) -> &'a [u8] {
        match bytes {
            [] => bytes,
            _ if !std::mem::take(&mut self.drops_blank) => bytes,
            bytes => bytes.strip_prefix(b" ").unwrap_or(bytes),
        }
    }

    /// What stands before the first token.
    fn begin(&mut self, opens: bool) -> Step {
        let echo = if opens { std::mem::take(&mut self.said.text) } else { String::new() };
        let pieces = if echo.is_empty() { Vec::new() } else { vec![Piece::Text(echo)] };
        Step { pieces, scored: self.plan.scores.then(|| std::mem::take(&mut self.front)), ..Step::default() }
    }

    fn why(&self, finish: Finish) -> Why {
        match (finish, self.text.stopped_by()) {
            (Finish::Stop, _) if self.parser.calls() > 0 => Why::ToolCalls,
            (Finish::Stop, Some(which)) => Why::StopString(self.plan.stops[which].clone()),
            (Finish::Stop, None) => Why::Stop,
            (Finish::Length, _) => Why::Length,
        }
    }

    fn keep(&mut self, step: &Step) {
        for piece in &step.pieces {
            match piece {
                Piece::Text(text) => self.said.text.push_str(text),
                Piece::Reasoning(text) => self.said.reasoning.push_str(text),
                Piece::Call { name, .. } => self.said.calls.push((name.clone(), String::new())),
                Piece::Arguments { json, .. } => {
                    if let Some((_, arguments)) = self.said.calls.last_mut() {
                        arguments.push_str(json);
                    }
                }
            }
        }
        if self.plan.keeps_scores
            && let (Some(kept), Some(scored)) = (&mut self.said.scored, &step.scored)
        {
            kept.extend_from_slice(scored);
        }
        self.said.tokens = self.text.tokens();
        self.said.ended.clone_from(&step.ended);
    }

    /// The choice has no tokens at all.
    pub(super) fn end_empty(&mut self) {
        self.said.ended = Some(Why::Length);
    }

    /// The only step of a choice without tokens.
    pub(super) fn empty_step(&mut self) -> Option<Step> {
        if self.text.tokens() > 0 {
            return None;
        }
        let step = Step { choice: self.index, opens: true, ended: self.said.ended.clone(), ..self.begin(true) };
        self.keep(&step);
        Some(step)
    }

    /// These tokens were taken before, elsewhere; their log-probabilities may follow.
    pub(super) fn remember(&mut self, had: Vec<u32>) {
        self.had = had;
    }

    /// Log-probabilities of the given tokens after the first: the prompt's when it is echoed, and of those had elsewhere.
    pub(super) fn supply(&mut self, prompt_len: usize, scores: &[Logprobs]) {
        let echoed = self.prompt.iter().enumerate().map(|(i, token)| (*token, i.checked_sub(1), true));
        let had = self.had.iter().enumerate().map(|(i, token)| (*token, Some(prompt_len + i - 1), false));
        let mut chars_so_far = 0;
        for (token, at, is_prompt) in echoed.chain(had) {
            if is_prompt || !self.plan.end_tokens.contains(&token) {
                let logprobs = at.and_then(|at| scores.get(at));
                self.front.push(self.plan.scored(token, logprobs, chars_so_far));
            }
            chars_so_far += chars(self.plan.bytes(token));
        }
    }

    /// Everything so far.
    pub(super) fn said(&mut self) -> &Said {
        if self.plan.keeps_scores
            && let Some(kept) = &mut self.said.scored
        {
            kept.append(&mut self.front);
        }
        &self.said
    }

    /// Why it ended, once it has.
    pub(super) fn ended(&self) -> Option<&Why> {
        self.said.ended.as_ref()
    }

    /// Tokens so far.
    pub(super) fn tokens(&self) -> u32 {
        self.text.tokens()
    }
}

impl Plan {
    /// Bytes of text that a token stands for here.
    fn bytes(&self, token: u32) -> &[u8] {
        match self.tokenizer.token_bytes(token) {
            [] => self.marks.iter().find(|(mark, _)| *mark == token).map_or(&[], |(_, text)| text.as_bytes()),
            bytes => bytes,
        }
    }

    fn spelled(&self, token: u32) -> Spelled {
        let bytes = match self.tokenizer.token_bytes(token) {
            [] => self.tokenizer.spelled(token).unwrap_or_default().into_bytes(),
            bytes => bytes.to_vec(),
        };
        Spelled { text: String::from_utf8_lossy(&bytes).into_owned(), bytes }
    }

    fn scored(&self, token: u32, logprobs: Option<&Logprobs>, offset: usize) -> Scored {
        Scored {
            token: self.spelled(token),
            logprob: logprobs.map(|l| l.chosen),
            top: logprobs
                .iter()
                .flat_map(|l| &l.top)
                .map(|(token, logprob)| (self.spelled(*token), *logprob))
                .collect(),
            offset,
        }
    }
}

/// Characters that begin in these bytes.
fn chars(bytes: &[u8]) -> usize {
    bytes.iter().filter(|byte| **byte & 0xC0 != 0x80).count()
}
