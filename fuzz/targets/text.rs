//! Bytes of tokens in, text out: the same however it is cut, nothing but what stands before the first stop string; and thoughts and calls
//! of tools are found the same however the text is cut.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use tidegate_node::{
    output::{Parser, Piece, Text, ToolFormat, Tools},
    stop::Finish,
};

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    tokens: Vec<&'a [u8]>,
    stops: Vec<String>,
    format: u8,
    thinks: Option<bool>,
}

fuzz_target!(|input: Input<'_>| {
    let stops: Vec<String> = input.stops.iter().take(16).filter(|stop| !stop.is_empty()).cloned().collect();
    let text = written(&input.tokens, &stops);
    let tools = tools(input.format);
    let whole = split(&[text.as_str()], input.thinks, tools.as_ref());
    let by_character: Vec<String> = text.chars().map(String::from).collect();
    let by_character: Vec<&str> = by_character.iter().map(String::as_str).collect();
    assert_eq!(split(&by_character, input.thinks, tools.as_ref()), whole);
});

/// The text that goes out of the tokens before the first stop string.
fn written(tokens: &[&[u8]], stops: &[String]) -> String {
    let (mut text, mut out) = (Text::new(stops), String::new());
    for (i, token) in tokens.iter().enumerate() {
        text.push(token, (i + 1 == tokens.len()).then_some(Finish::Length), &mut out);
    }
    let bytes = tokens.concat();
    let all = String::from_utf8_lossy(&bytes);
    assert!(all.starts_with(&out));
    assert!(stops.iter().all(|stop| !out.contains(stop.as_str())));
    match (text.finish(), text.stopped_by()) {
        (Some(Finish::Length), None) => assert_eq!(out, all),
        (Some(Finish::Stop), Some(stop)) => assert!(all[out.len()..].starts_with(stops[stop].as_str())),
        (None, None) => assert!(tokens.is_empty()),
        ended => panic!("{ended:?}"),
    }
    out
}

fn tools(format: u8) -> Option<Tools> {
    use ToolFormat::*;
    let format = *[Hermes, HermesList, Llama3, Mistral, Json].get(usize::from(format) % 6)?;
    Some(Tools { format, names: vec!["f".to_owned(), "get".to_owned()], calls_max: 3 })
}

/// What the parts hold, neighbours of one kind joined.
fn split(parts: &[&str], thinks: Option<bool>, tools: Option<&Tools>) -> Vec<Piece> {
    let mut parser = Parser::new(thinks, tools);
    let mut pieces: Vec<Piece> = parts.iter().flat_map(|part| parser.push(part, false)).collect();
    pieces.extend(parser.push("", true));
    let mut joined: Vec<Piece> = Vec::new();
    for piece in pieces {
        match (joined.last_mut(), piece) {
            (Some(Piece::Text(before)), Piece::Text(more)) => before.push_str(&more),
            (Some(Piece::Reasoning(before)), Piece::Reasoning(more)) => before.push_str(&more),
            (Some(Piece::Arguments { index, json }), Piece::Arguments { index: at, json: more }) if *index == at => {
                json.push_str(&more);
            }
            (_, Piece::Text(text) | Piece::Reasoning(text)) if text.is_empty() => {}
            (_, piece) => joined.push(piece),
        }
    }
    joined
}
