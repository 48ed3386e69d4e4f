//! Goal: many streams at once give far more tokens a second than the same requests in turn, not one token changes by the company it
//! is in, and what their prompts have in common is computed once. Method: 32 different greedy requests to one node, first each alone,
//! then all together; texts compared, times printed. Then eight prompts of token ids with one beginning, all at once to a node that has
//! never seen it and whose steps are smaller than it, then each alone; tokens compared, and the prefix cache's counts.

use std::time::Instant;

use futures::future::join_all;
use serde_json::json;

use crate::support::{
    client::{Client, End, Streamed, Wire, chat_stream},
    cluster::{NodePlan, lone_node},
};

const STREAMS: usize = 32;
const TOKENS_MAX: u32 = 32;

/// How much more at least; what it was stands in the output.
const GAIN_MIN: f64 = 1.5;

fn prompt(i: usize) -> String {
    const SUBJECTS: [&str; 8] =
        ["the sea", "a lighthouse", "bread", "winter", "trains", "the moon", "gardens", "rivers"];
    const FORMS: [&str; 4] =
        ["Write two sentences about", "Explain to a child", "List three facts about", "Tell a story of"];
    format!("{} {}.", FORMS[i / SUBJECTS.len()], SUBJECTS[i % SUBJECTS.len()])
}

#[tokio::test]
async fn streams_together_are_faster_and_no_different() {
    let plan = NodePlan { lines: "max_batch_size = 32", ..NodePlan::named("n1") };
    let (_node, base, _folder) = lone_node(plan).await;
    let (client, url) = (Client::new(), format!("{base}/v1/chat/completions"));
    let ask = |i: usize| {
        let (client, url) = (client.clone(), url.clone());
        async move { client.stream(&url, &chat_stream(&prompt(i), TOKENS_MAX), |_| {}).await }
    };

    let start = Instant::now();
    let mut alone = Vec::with_capacity(STREAMS);
    for i in 0..STREAMS {
        alone.push(ask(i).await);
    }
    let rate_alone = rate(&alone, start);
    let start = Instant::now();
    let together = join_all((0..STREAMS).map(ask)).await;
    let rate_together = rate(&together, start);

    let gain = rate_together / rate_alone;
    println!(
        "one after another {rate_alone:.0} tokens/s, {STREAMS} together {rate_together:.0} tokens/s: {gain:.2} times"
    );
    for (i, (alone, together)) in alone.iter().zip(&together).enumerate() {
        assert_eq!((alone.end(), together.end()), (End::Whole, End::Whole), "{:?} {:?}", alone.fault, together.fault);
        assert!(!alone.text.is_empty(), "request {i} has no answer");
        assert_eq!(alone.text, together.text, "the answer to request {i} changed in company");
    }
    assert!(gain >= GAIN_MIN, "only {gain:.2} times as fast");
}

fn rate(streams: &[Streamed], start: Instant) -> f64 {
    streams.iter().map(|stream| stream.tokens).sum::<u64>() as f64 / start.elapsed().as_secs_f64()
}

/// Whole blocks of tokens that all prompts begin with.
const COMMON: u32 = 304;
const OWN: u32 = 12;
const PROMPTS: u32 = 8;

#[tokio::test]
async fn what_prompts_have_in_common_is_computed_once_when_they_come_together() {
    let plan = NodePlan { lines: "max_batch_tokens = 64", ..NodePlan::named("n1") };
    let (_node, base, _folder) = lone_node(plan).await;
    let (client, url) = (Client::new(), format!("{base}/v1/completions"));
    let ask = |i: u32| {
        let (client, url) = (client.clone(), url.clone());
        // ids of words, far from those that steer
        let prompt: Vec<u32> = (0..COMMON).chain((0..OWN).map(|k| 1000 * (i + 1) + k)).map(|id| 1000 + id).collect();
        let body = json!({"prompt": prompt, "max_tokens": 16, "temperature": 0, "ignore_eos": true});
        async move { client.wire(&url, &body).await }
    };
    let together = join_all((0..PROMPTS).map(ask)).await;
    let found = client.metric(&base, "vllm:prefix_cache_hits_total").await;
    let asked = client.metric(&base, "vllm:prefix_cache_queries_total").await;
    println!("{found} of {asked} tokens of {PROMPTS} prompts were found");
    assert_eq!(asked, f64::from(PROMPTS * (COMMON + OWN)));
    assert_eq!(found, f64::from((PROMPTS - 1) * COMMON), "all but one were to find what they have in common");
    for (i, together) in (0..).zip(&together) {
        let Wire { tokens, .. } = ask(i).await;
        assert_eq!(tokens, together.tokens, "the answer to prompt {i} changed in company");
    }
}
