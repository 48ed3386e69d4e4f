//! A node's stream of any bytes, cut anywhere: the same events pass, the same tokens are counted, and nothing but whole lines passes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tidegate_balancer::fuzz::pass;

fuzz_target!(|input: (&[u8], Vec<u8>)| {
    let (stream, cuts) = input;
    let whole = pass(&[stream]);
    let mut parts = Vec::new();
    let mut rest = stream;
    for cut in cuts {
        let (part, after) = rest.split_at(rest.len().min(usize::from(cut)));
        parts.push(part);
        rest = after;
    }
    parts.push(rest);
    assert_eq!(pass(&parts), whole);
    if let Some((passed, _)) = whole {
        assert!(passed.is_empty() || passed.ends_with(b"\n"));
        assert!(!passed.split(|b| *b == b'\n').any(|line| line.starts_with(b"id:")));
    }
});
