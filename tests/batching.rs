//! Goal: many streams at once give far more tokens a second than the same requests in turn, and not one token changes by the company it
//! is in. Method: 32 different greedy requests to one node, first each alone, then all together; texts compared, times printed.

use std::time::Instant;

use futures::future::join_all;

use crate::support::{
    client::{Client, End, Streamed, chat_stream},
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
