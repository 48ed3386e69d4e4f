//! Places among the requests in flight, over the whole balancer.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use tidegate_common::contract::{ApiError, ErrorKind};

/// Counts the requests in flight.
#[derive(Debug, Clone, Default)]
pub(crate) struct Places(Arc<AtomicUsize>);

/// A place among the requests in flight, held until the last byte of the answer.
#[derive(Debug)]
pub(crate) struct Place(Arc<AtomicUsize>);

impl Places {
    /// A place, where fewer than `places_max` are taken.
    pub(crate) fn enter(&self, places_max: usize) -> Result<Place, ApiError> {
        match self.0.fetch_update(SeqCst, SeqCst, |taken| (taken < places_max).then_some(taken + 1)) {
            Ok(_) => Ok(Place(Arc::clone(&self.0))),
            Err(_) => Err(ApiError::new(
                ErrorKind::Unavailable,
                "overloaded",
                "too many requests at once (balancer.limits.max_concurrent_requests)",
            )
            .with_retry_after(Duration::from_secs(1))),
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_comes_back_when_it_is_dropped() {
        let places = Places::default();
        let place = places.enter(1).unwrap();
        let refusal = places.enter(1).unwrap_err();
        assert_eq!((refusal.status(), refusal.retry_after_s()), (503, Some(1)));
        let second = places.enter(2).unwrap();
        drop(place);
        assert!(places.enter(1).is_err(), "the bound was lowered meanwhile");
        drop(second);
        assert!(places.enter(1).is_ok());
    }
}
