//! Goal: each API's answers are what its clients read, and an answer that is taken up anywhere goes on with exactly the rest. Method: text
//! made of single tokens goes through a choice into each shape; transcripts are kept as snapshots, and every cut is compared with the whole.

use std::sync::Arc;

use proptest::prelude::*;
use tidegate_common::contract::event;

use super::*;
use crate::{
    guide::tests::guides,
    http::choice::{Choice, Plan},
    output::{ToolFormat, Tools},
    sample::Logprobs,
    stop::Finish,
};

#[derive(Debug, Clone, Copy)]
enum Api {
    Chat,
    Completion,
    Query,
    Responses,
    Messages,
}

const APIS: [Api; 5] = [Api::Chat, Api::Completion, Api::Query, Api::Responses, Api::Messages];

const THINKS_AND_CALLS: &str =
    "<think>hm</think>I see.\n<tool_call>\n{\"name\": \"now\", \"arguments\": {\"tz\": \"CET\"}}\n</tool_call>";

fn shape(api: Api) -> Box<dyn Shape> {
    let head = Head { request: "r1".into(), created: 7, model: "m".into(), fingerprint: "f".into() };
    let mut shape: Box<dyn Shape> = match api {
        Api::Chat => Box::new(Chat::new(head, true)),
        Api::Completion => Box::new(Completion::new(head, true)),
        Api::Query => Box::new(Query::new(head, true)),
        Api::Responses => Box::new(Responses::new(head, json!({"tools": []}))),
        Api::Messages => Box::new(Messages::new(head)),
    };
    shape.begin(3);
    shape
}

fn plan(api: Api, scores: bool, keeps_scores: bool) -> Arc<Plan> {
    let (_, tokenizer) = guides();
    let is_conversation = !matches!(api, Api::Completion);
    let tools = Tools { format: ToolFormat::Hermes, names: vec!["now".into()], calls_max: 8 };
    Arc::new(Plan {
        end_tokens: tokenizer.end_tokens().into(),
        tokenizer,
        stops: vec!["END".into()],
        marks: Vec::new(),
        thoughts: is_conversation.then_some(false),
        tools: is_conversation.then_some(tools),
        scores,
        keeps_scores,
        echo: matches!(api, Api::Completion),
    })
}

struct Run {
    /// The events of each token, and at the end those of the tail.
    events: Vec<String>,
    whole: Value,
}

/// Everything that an answer of this text makes.
fn run(api: Api, text: &str, finish: Finish, scores: bool) -> Run {
    let plan = plan(api, scores, false);
    let prompt = plan.tokenizer.encode("Say", false).unwrap();
    let (mut choice, mut shape) = (Choice::new(0, plan.clone(), &prompt), shape(api));
    let tokens = plan.tokenizer.encode(text, false).unwrap();
    let mut events = Vec::new();
    for (i, token) in tokens.iter().enumerate() {
        if choice.ended().is_some() {
            break;
        }
        let logprobs = Logprobs { chosen: -0.5, top: vec![(*token, -0.5)] };
        let step = choice.take(*token, scores.then_some(&logprobs), (i + 1 == tokens.len()).then_some(finish));
        events.push(written(|out| shape.step(&step, out)));
    }
    let usage = Usage { prompt: 3, completion: tokens.len(), reasoning: choice.said().tokens_reasoning as usize };
    events.push(written(|out| shape.tail(&[choice.said()], usage, out)));
    let whole = shape.whole(&[choice.said()], usage);
    Run { events, whole }
}

fn written(make: impl FnOnce(&mut Vec<Event>)) -> String {
    let (mut events, mut out) = (Vec::new(), Vec::new());
    make(&mut events);
    events.iter().for_each(|e| event::write(&mut out, None, e.name, Some(e.data.as_bytes())));
    String::from_utf8(out).unwrap()
}

#[test]
fn transcripts_are_what_each_apis_clients_read() {
    for api in APIS {
        let text = if matches!(api, Api::Completion | Api::Query) { "Hi theEND" } else { THINKS_AND_CALLS };
        let run = run(api, text, Finish::Stop, matches!(api, Api::Completion));
        insta::assert_snapshot!(format!("{api:?}"), run.events.concat() + &run.whole.to_string());
    }
}

#[test]
fn a_length_met_and_a_stop_string_are_told_in_each_apis_words() {
    let reasons = |text: &str, finish| {
        let path = |api, pointer: &str| run(api, text, finish, false).whole.pointer(pointer).cloned().unwrap();
        [
            path(Api::Chat, "/choices/0/finish_reason"),
            path(Api::Responses, "/status"),
            path(Api::Messages, "/stop_reason"),
            path(Api::Messages, "/stop_sequence"),
        ]
    };
    assert_eq!(reasons("so", Finish::Length), [json!("length"), json!("incomplete"), json!("max_tokens"), Value::Null]);
    assert_eq!(
        reasons("soEND", Finish::Length),
        [json!("stop"), json!("completed"), json!("stop_sequence"), json!("END")]
    );
    assert_eq!(reasons("so", Finish::Stop), [json!("stop"), json!("completed"), json!("end_turn"), Value::Null]);
}

#[test]
fn scores_told_token_by_token_are_those_of_the_whole_and_of_one_taken_up() {
    let plan = plan(Api::Completion, true, true);
    let encode = |text: &str| plan.tokenizer.encode(text, false).unwrap();
    let (prompt, tokens) = (encode("Say"), encode("so, a tree"));
    let of = |token: u32| Logprobs { chosen: -0.1 * token as f32, top: vec![(token, -0.1)] };
    let given: Vec<u32> = [prompt.as_slice(), &tokens].concat();
    let all = |had: usize| {
        let mut choice = Choice::new(0, plan.clone(), &prompt);
        for (i, token) in tokens[..had].iter().enumerate() {
            choice.take(*token, None, (i + 1 == tokens.len()).then_some(Finish::Length));
        }
        choice.remember(tokens[..had].to_vec());
        let scores: Vec<Logprobs> = given[1..prompt.len() + had].iter().map(|token| of(*token)).collect();
        choice.supply(prompt.len(), &scores);
        for (i, token) in tokens.iter().enumerate().skip(had) {
            choice.take(*token, Some(&of(*token)), (i + 1 == tokens.len()).then_some(Finish::Length));
        }
        choice.said().scored.clone().unwrap()
    };
    let whole = all(0);
    assert_eq!(whole.len(), given.len());
    assert_eq!((whole[0].logprob, whole[3].offset), (None, 3));
    for had in 1..=tokens.len() {
        assert_eq!(all(had), whole, "after {had}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Law: whatever the text and wherever it is taken up, a shape that was shown the beginning writes exactly the rest.
    #[test]
    fn an_answer_taken_up_anywhere_goes_on_with_exactly_the_rest(
        parts in prop::collection::vec(prop::sample::select(vec![
            "<think>", "</think>", "<tool_call>", "</tool_call>", "{\"name\": \"now\", ", "\"arguments\": {\"a\": 1}", "}", "\n", " word", "E", "END",
        ]), 1..8),
        api in prop::sample::select(APIS.to_vec()), cut in 0usize..40,
    ) {
        let text = parts.concat();
        let whole = run(api, &text, Finish::Length, false);
        let steps = whole.events.len() - 1;
        let cut = cut % (steps + 1);
        let plan = plan(api, false, false);
        let (prompt, tokens) = (plan.tokenizer.encode("Say", false).unwrap(), plan.tokenizer.encode(&text, false).unwrap());
        let (mut choice, mut shape) = (Choice::new(0, plan, &prompt), shape(api));
        for (i, token) in tokens[..steps].iter().enumerate() {
            let step = choice.take(*token, None, (i + 1 == tokens.len()).then_some(Finish::Length));
            let events = written(|out| shape.step(&step, out));
            if i >= cut {
                prop_assert_eq!(&events, &whole.events[i]);
            }
        }
        let usage = Usage { prompt: 3, completion: tokens.len(), reasoning: choice.said().tokens_reasoning as usize };
        prop_assert_eq!(&written(|out| shape.tail(&[choice.said()], usage, out)), &whole.events[steps]);
        prop_assert_eq!(shape.whole(&[choice.said()], usage), whole.whole);
    }
}
