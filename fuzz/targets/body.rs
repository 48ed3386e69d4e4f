//! A request's body of any bytes is read or refused with a status of the client's, at the edge and by each API of a node.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let at_edge = tidegate_balancer::fuzz::body(bytes);
    let at_node = tidegate_node::http::fuzz::body(bytes);
    assert!(at_edge.into_iter().chain(at_node).all(|status| (400..500).contains(&status)));
});
