//! Traces: where a client's place in a trace goes, and what a collector gets of a request that went over two nodes.

use crate::{
    collector::{Collector, Span},
    support::{Act, CHAT, House, chat, end, texts, tokens},
};

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const CALLER: &str = "b7ad6b7169203331";

fn named<'a>(spans: &'a [Span], name: &str) -> Vec<&'a Span> {
    spans.iter().filter(|span| span.name == name).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_moves_is_one_trace_under_its_clients_span() {
    let collector = Collector::start().await;
    let mut house = House::with(1, &collector.section("")).await;
    house.nodes[0].script(vec![Act::Head, tokens(0, &[1], "a"), Act::Kill]);
    house.nodes[0].script(vec![Act::Head, tokens(1, &[2], "b"), Act::Kill]);
    house.nodes[0].script(vec![Act::Head, tokens(2, &[3], "c"), end("[DONE]"), Act::Finish]);
    let request = house.client.post(house.url(CHAT)).body(chat(true).to_string());
    let request = request.header("traceparent", format!("00-{TRACE}-{CALLER}-01")).header("tracestate", "x=1");
    let answer = request.send().await.unwrap();
    assert_eq!(answer.headers()["x-request-id"], TRACE, "without an id of its own it has the trace's");
    assert_eq!(texts(&answer.text().await.unwrap()), ("abc".to_owned(), true));
    let seen = [house.asked().await, house.asked().await, house.asked().await];
    for seen in &seen {
        assert!(seen.header("traceparent").is_some_and(|place| place.contains(TRACE) && place.ends_with("-01")));
        assert_eq!(seen.header("tracestate"), Some("x=1"));
    }
    house.fire();
    house.ended().await;
    let spans = collector.spans();
    let whole = named(&spans, &format!("POST {CHAT}"))[0];
    assert_eq!((whole.trace.as_str(), whole.parent.as_str(), whole.role.as_str()), (TRACE, CALLER, "balancer"));
    assert_eq!(whole.events, ["resume", "resume"]);
    for (key, value) in [
        ("gen_ai.operation.name", "chat"),
        ("gen_ai.request.model", "tiny"),
        ("http.response.status_code", "200"),
        ("tidegate.resumes", "2"),
    ] {
        assert_eq!(whole.attributes[key], value);
    }
    assert!(whole.attributes["gen_ai.response.time_to_first_chunk"].parse::<f64>().unwrap() > 0.0 && !whole.is_error);
    let legs: Vec<&Span> = spans.iter().filter(|span| span.name.starts_with("ask n")).collect();
    assert_eq!(legs.len(), 3);
    for (leg, seen) in legs.iter().zip(&seen) {
        assert_eq!((&leg.parent, leg.trace.as_str()), (&whole.id, TRACE));
        assert!(seen.header("traceparent").unwrap().contains(&leg.id), "the node's parent is the leg");
        assert!(leg.time.0 >= whole.time.0 && leg.time.1 <= whole.time.1 && leg.time.0 <= leg.time.1);
    }
    assert_eq!(legs.iter().map(|leg| leg.is_error).collect::<Vec<_>>(), [true, true, false]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trace_that_nobody_wants_to_see_is_passed_on_and_not_exported() {
    let collector = Collector::start().await;
    let mut house = House::with(1, &collector.section("sampling = 0.0")).await;
    for place in [format!("00-{TRACE}-{CALLER}-00"), "no place at all".to_owned()] {
        let request = house.client.post(house.url(CHAT)).body(chat(false).to_string());
        assert_eq!(request.header("traceparent", place).send().await.unwrap().status(), 200);
    }
    assert!(house.asked().await.header("traceparent").unwrap().starts_with(&format!("00-{TRACE}-")));
    let new = house.asked().await.header("traceparent").unwrap().to_owned();
    assert!(!new.contains(TRACE) && new.ends_with("-00"), "{new}");
    house.fire();
    house.ended().await;
    assert_eq!(collector.spans(), []);
}

#[tokio::test]
async fn without_a_collector_nothing_is_begun() {
    let mut house = House::with_nodes(1).await;
    let request = house.client.post(house.url(CHAT)).body(chat(false).to_string());
    request.header("traceparent", format!("00-{TRACE}-{CALLER}-01")).send().await.unwrap();
    assert_eq!(house.asked().await.header("traceparent"), None);
}
