//! A file of keys of any text is read or refused; what is read and written again is the same.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| assert!(tidegate_balancer::fuzz::keys(text)));
