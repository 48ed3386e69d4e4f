//! A token that nobody has signed is refused, whatever it says of itself.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| assert!(!tidegate_balancer::fuzz::token(bytes).is_empty()));
