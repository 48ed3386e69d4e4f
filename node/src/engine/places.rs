//! Places with the engine: how many sequences may run and wait, of all tenants and of one. Given back by `Drop`, at once, whatever the
//! engine is doing.
//!
//! Sequences from a node that was lost have as many places of their own: they were let in once, and a third of a cluster's streams must
//! not end because the other nodes are full of new ones.

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
    moved: usize,
    /// Only tenants that have any.
    by_tenant: HashMap<Arc<str>, usize>,
}

/// One sequence's place.
#[derive(Debug)]
pub(super) struct Place {
    places: Arc<Places>,
    /// Whose it is; of a sequence from elsewhere it does not matter.
    tenant: Option<Arc<str>>,
}

impl Places {
    pub(super) fn new(all_max: usize, tenant_max: usize) -> Arc<Self> {
        Arc::new(Self { all_max, tenant_max, taken: Mutex::default() })
    }

    /// So many places, or none.
    pub(super) fn take(
        self: &Arc<Self>,
        tenant: &Arc<str>,
        count: usize,
        is_moved: bool,
    ) -> Result<Vec<Place>, Refused> {
        let tenant = (!is_moved).then_some(tenant);
        self.taken().add(tenant, count, self)?;
        Ok((0..count).map(|_| Place { places: self.clone(), tenant: tenant.cloned() }).collect())
    }

    /// How many are taken.
    pub(super) fn open(&self) -> usize {
        let taken = self.taken();
        taken.all + taken.moved
    }

    fn taken(&self) -> MutexGuard<'_, Taken> {
        // numbers are whole at every moment
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Taken {
    fn add(&mut self, tenant: Option<&Arc<str>>, count: usize, bounds: &Places) -> Result<(), Refused> {
        let Some(tenant) = tenant else {
            let fits = self.moved + count <= bounds.all_max;
            self.moved += if fits { count } else { 0 };
            return fits.then_some(()).ok_or(Refused::Full);
        };
        let had = self.by_tenant.get(tenant).copied().unwrap_or(0);
        if self.all + count > bounds.all_max {
            return Err(Refused::Full);
        }
        if had + count > bounds.tenant_max {
            return Err(Refused::TenantFull);
        }
        if count > 0 {
            self.all += count;
            self.by_tenant.insert(tenant.clone(), had + count);
        }
        Ok(())
    }

    fn give_back(&mut self, tenant: Option<&Arc<str>>) {
        let Some(tenant) = tenant else {
            self.moved -= 1;
            return;
        };
        self.all -= 1;
        if let Some(count) = self.by_tenant.get_mut(tenant) {
            *count -= 1;
            if *count == 0 {
                self.by_tenant.remove(tenant);
            }
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.places.taken().give_back(self.tenant.as_ref());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_tenant_cannot_take_all_and_what_is_given_back_is_forgotten() {
        let places = Places::new(5, 3);
        let (greedy, calm): (Arc<str>, Arc<str>) = ("greedy".into(), "calm".into());
        let held = places.take(&greedy, 3, false).unwrap();
        assert_eq!(places.take(&greedy, 1, false).unwrap_err(), Refused::TenantFull);
        let other = places.take(&calm, 2, false).unwrap();
        assert_eq!(places.take(&calm, 1, false).unwrap_err(), Refused::Full);
        drop(held);
        assert_eq!(places.open(), 2);
        assert_eq!(places.take(&greedy, 3, false).map(|held| held.len()), Ok(3));
        drop(other);
        assert_eq!((places.open(), places.taken().by_tenant.len()), (0, 0));
    }

    #[test]
    fn sequences_from_a_lost_node_have_places_of_their_own_and_those_are_bounded_too() {
        let places = Places::new(4, 2);
        let tenant: Arc<str> = "busy".into();
        let _new = places.take(&tenant, 2, false).unwrap();
        let moved = places.take(&tenant, 4, true).unwrap();
        assert_eq!(places.take(&tenant, 1, true).unwrap_err(), Refused::Full);
        assert_eq!(places.take(&tenant, 1, false).unwrap_err(), Refused::TenantFull);
        assert_eq!(places.take(&"other".into(), 2, false).map(|held| held.len()), Ok(2));
        drop(moved);
        assert_eq!(places.open(), 2);
    }
}
