//! A request's body of any bytes is read or refused with a status of the client's, at the edge and at a node.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    for refused in [tidegate_balancer::fuzz::body(bytes), tidegate_node::http::fuzz::body(bytes)] {
        assert!(refused.is_none_or(|status| (400..500).contains(&status)));
    }
});
