//! A file of an audit log of any bytes: it is read to its end, and no line passes but one with its own hash.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tidegate_balancer::fuzz::audit;

fuzz_target!(|bytes: &[u8]| {
    let (faults, _) = audit(bytes);
    // a key is asked for, and no line of chance has a MAC
    assert!(faults > 0 || !bytes.contains(&b'{'));
});
