//! What comes in the place of a header of the PROXY protocol is read or refused.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    tidegate_balancer::fuzz::proxy_header(bytes);
});
