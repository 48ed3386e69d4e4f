//! Policies of any text are read or refused with their problems, and those that are read answer any question.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (&str, &str, &str)| {
    let (text, action, resource) = input;
    tidegate_balancer::fuzz::policies(text, action, resource);
});
