//! Places with the engine: how many sequences may run and wait, of all tenants and of one. Given back by `Drop`, at once, whatever the
//! engine is doing.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use super::Refused;

/// All places.
#[derive(Debug)]
pub(super) struct Places {
    all_max: usize,
    tenant_max: usize,
    taken: Mutex<Taken>,
}

#[derive(Debug, Default)]
struct Taken {
    all: usize,
    /// Only tenants that have any.
    by_tenant: HashMap<Arc<str>, usize>,
}

/// One sequence's place.
#[derive(Debug)]
pub(super) struct Place {
    places: Arc<Places>,
    tenant: Arc<str>,
}

impl Places {
    pub(super) fn new(all_max: usize, tenant_max: usize) -> Arc<Self> {
        Arc::new(Self { all_max, tenant_max, taken: Mutex::default() })
    }

    /// So many places, or none.
    pub(super) fn take(self: &Arc<Self>, tenant: &Arc<str>, count: usize) -> Result<Vec<Place>, Refused> {
        let mut taken = self.taken();
        let had = taken.by_tenant.get(tenant).copied().unwrap_or(0);
        if taken.all + count > self.all_max {
            return Err(Refused::Full);
        }
        if had + count > self.tenant_max {
            return Err(Refused::TenantFull);
        }
        if count > 0 {
            taken.all += count;
            taken.by_tenant.insert(tenant.clone(), had + count);
        }
        drop(taken);
        Ok((0..count).map(|_| Place { places: self.clone(), tenant: tenant.clone() }).collect())
    }

    /// How many are taken.
    pub(super) fn open(&self) -> usize {
        self.taken().all
    }

    fn taken(&self) -> MutexGuard<'_, Taken> {
        // numbers are whole at every moment
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.places.taken();
        taken.all -= 1;
        if let Some(count) = taken.by_tenant.get_mut(&self.tenant) {
            *count -= 1;
            if *count == 0 {
                taken.by_tenant.remove(&self.tenant);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_tenant_cannot_take_all_and_what_is_given_back_is_forgotten() {
        let places = Places::new(5, 3);
        let (greedy, calm): (Arc<str>, Arc<str>) = ("greedy".into(), "calm".into());
        let held = places.take(&greedy, 3).unwrap();
        assert_eq!(places.take(&greedy, 1).unwrap_err(), Refused::TenantFull);
        let other = places.take(&calm, 2).unwrap();
        assert_eq!(places.take(&calm, 1).unwrap_err(), Refused::Full);
        drop(held);
        assert_eq!(places.open(), 2);
        assert_eq!(places.take(&greedy, 3).map(|held| held.len()), Ok(3));
        drop(other);
        assert_eq!((places.open(), places.taken().by_tenant.len()), (0, 0));
    }
}
