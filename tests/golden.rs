//! Goal: the default model's answers are those of the record, token for token, so that no change of the engine changes an answer
//! unnoticed. Method: fifty fixed greedy requests (chat and completion, several languages, code, numbers, long prompts), all in one
//! batch of a real node, beside what `tests/golden/` holds. Answers are equal within one device class; on another, most of them must
//! still begin alike. `UPDATE_GOLDEN=1` writes the record anew; whoever does that raises `CODE` in `node/src/served/alike.rs`.

use std::{fs, path::PathBuf};

use futures::future::join_all;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::support::{
    MODEL,
    client::{Client, Wire},
    cluster::{NodePlan, lone_node},
};

/// How many first tokens must be alike on another device class.
const FIRST_TOKENS: usize = 8;

/// Longest prompt that is asked there.
const PROMPT_TOKENS_MAX: u64 = 200;

/// Share of the answers that must begin alike there.
const SHARE_MIN: f64 = 0.6;

#[derive(Deserialize)]
struct Prompt {
    name: String,
    path: String,
    body: Value,
}

/// What one build said on one device class.
#[derive(Serialize, Deserialize)]
struct Record {
    device: String,
    answers: Vec<Answer>,
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Answer {
    name: String,
    prompt_tokens: u64,
    finish: String,
    text: String,
    tokens: Vec<u32>,
}

impl Answer {
    fn read(prompt: &Prompt, Wire { mut tokens, body }: Wire) -> Self {
        let choice = &body["choices"][0];
        let text = choice["message"]["content"].as_str().or(choice["text"].as_str());
        Self {
            name: prompt.name.clone(),
            prompt_tokens: body["usage"]["prompt_tokens"].as_u64().unwrap(),
            finish: choice["finish_reason"].as_str().unwrap().to_owned(),
            text: text.unwrap().to_owned(),
            tokens: tokens.remove(&0).unwrap(),
        }
    }

    fn begins_like(&self, other: &Self) -> bool {
        self.tokens.iter().take(FIRST_TOKENS).eq(other.tokens.iter().take(FIRST_TOKENS))
    }
}

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

/// One answer a line, so that a change shows which.
fn write(record: &Record) {
    let lines: Vec<String> = record.answers.iter().map(|answer| serde_json::to_string(answer).unwrap()).collect();
    let device = serde_json::to_string(&record.device).unwrap();
    let text = format!("{{\"device\": {device}, \"answers\": [\n{}\n]}}\n", lines.join(",\n"));
    fs::write(folder().join(format!("{MODEL}.json")), text).unwrap();
}

fn read(name: &str) -> Vec<u8> {
    fs::read(folder().join(name)).unwrap_or_else(|e| panic!("tests/golden/{name}: {e}; UPDATE_GOLDEN=1 makes it"))
}

#[tokio::test]
async fn answers_are_those_of_the_record() {
    let prompts: Vec<Prompt> = serde_json::from_slice(&read("prompts.json")).unwrap();
    assert!(prompts.len() >= 50);
    let plan = NodePlan { lines: "max_batch_size = 64", ..NodePlan::named("n1") };
    let (_node, base, _folder) = lone_node(plan).await;
    let device =
        Client::new().get(&format!("{base}/health")).await.unwrap().body["device"].as_str().unwrap().to_owned();
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        write(&Record { device, answers: ask_all(&base, prompts, None).await });
        return println!("the record is written anew");
    }
    let record: Record = serde_json::from_slice(&read(&format!("{MODEL}.json"))).unwrap();
    let names: Vec<_> = record.answers.iter().map(|answer| &answer.name).collect();
    assert!(prompts.iter().map(|p| &p.name).eq(names), "the record is of other prompts; UPDATE_GOLDEN=1 makes it anew");
    if device == record.device {
        compare_whole(&record, &ask_all(&base, prompts, None).await);
    } else {
        compare_first_tokens(&base, &device, prompts, record).await;
    }
}

/// All at once, so that they share one batch.
async fn ask_all(base: &str, prompts: Vec<Prompt>, tokens_max: Option<usize>) -> Vec<Answer> {
    let client = Client::new();
    let ask = async |mut prompt: Prompt| {
        prompt.body["temperature"] = 0.into();
        prompt.body["max_tokens"] = tokens_max.map_or(prompt.body["max_tokens"].clone(), Value::from);
        Answer::read(&prompt, client.wire(&format!("{base}{}", prompt.path), &prompt.body).await)
    };
    join_all(prompts.into_iter().map(ask)).await
}

fn compare_whole(record: &Record, answers: &[Answer]) {
    let changed = record.answers.iter().zip(answers).filter(|(then, now)| then != now);
    let changed: Vec<String> = changed.map(|(then, now)| format!("then {then:?}\nnow  {now:?}")).collect();
    assert!(changed.is_empty(), "{} answers changed:\n{}", changed.len(), changed.join("\n"));
    println!("{} answers of {} are those of the record", answers.len(), record.device);
}

/// Without the long prompts, which take minutes where there are no int8 products.
async fn compare_first_tokens(base: &str, device: &str, prompts: Vec<Prompt>, record: Record) {
    let pairs = prompts.into_iter().zip(record.answers).filter(|(_, then)| then.prompt_tokens <= PROMPT_TOKENS_MAX);
    let (prompts, then): (Vec<_>, Vec<_>) = pairs.unzip();
    let now = ask_all(base, prompts, Some(FIRST_TOKENS)).await;
    let lengths = |answers: &[Answer]| answers.iter().map(|answer| answer.prompt_tokens).collect::<Vec<_>>();
    assert_eq!(lengths(&then), lengths(&now), "the template or the tokenizer changed");
    let alike = then.iter().zip(&now).filter(|(then, now)| then.begins_like(now)).count();
    let (all, theirs) = (now.len(), record.device);
    println!(
        "the record is of {theirs}, this is {device}: {alike} of {all} answers begin with the same {FIRST_TOKENS} tokens"
    );
    assert!(alike as f64 >= SHARE_MIN * all as f64, "too few");
}
