//! The instances of a world, found by id and by service: with thousands of them, looking
//! through all for each service would be most of planning.

use std::collections::BTreeMap;
use std::sync::Arc;

use kiln_model::{InstanceId, ServiceName};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::world::Instance;

/// Goes by service, then by id, and is stored as a map of ids. An instance's service never
/// changes. A clone shares what neither changes: every step keeps the world before it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Instances {
    services: BTreeMap<ServiceName, Arc<BTreeMap<InstanceId, Instance>>>,
    service_of: Arc<BTreeMap<InstanceId, ServiceName>>,
}

impl Instances {
    pub fn insert(&mut self, id: InstanceId, instance: Instance) {
        self.remove(&id);
        let service = instance.service.clone();
        Arc::make_mut(&mut self.service_of).insert(id.clone(), service.clone());
        let copies = self.services.entry(service).or_default();
        Arc::make_mut(copies).insert(id, instance);
    }

    pub fn remove(&mut self, id: &InstanceId) -> Option<Instance> {
        if !self.contains_key(id) {
            return None;
        }
        let service = Arc::make_mut(&mut self.service_of).remove(id)?;
        let copies = Arc::make_mut(self.services.get_mut(&service)?);
        let instance = copies.remove(id);
        if copies.is_empty() {
            self.services.remove(&service);
        }
        instance
    }

    pub fn get(&self, id: &InstanceId) -> Option<&Instance> {
        self.services.get(self.service_of.get(id)?)?.get(id)
    }

    pub fn get_mut(&mut self, id: &InstanceId) -> Option<&mut Instance> {
        let copies = self.services.get_mut(self.service_of.get(id)?)?;
        Arc::make_mut(copies).get_mut(id)
    }

    pub fn contains_key(&self, id: &InstanceId) -> bool {
        self.service_of.contains_key(id)
    }

    pub fn len(&self) -> usize {
        self.service_of.len()
    }

    pub fn is_empty(&self) -> bool {
        self.service_of.is_empty()
    }

    /// In their own order.
    pub fn keys(&self) -> impl Iterator<Item = &InstanceId> {
        self.service_of.keys()
    }

    pub fn iter(&self) -> impl Iterator<Item = (&InstanceId, &Instance)> {
        self.services.values().flat_map(|copies| copies.iter())
    }

    pub fn values(&self) -> impl Iterator<Item = &Instance> {
        self.services.values().flat_map(|copies| copies.values())
    }

    pub fn values_mut(&mut self) -> impl Iterator<Item = &mut Instance> {
        let services = self.services.values_mut();
        services.flat_map(|copies| Arc::make_mut(copies).values_mut())
    }

    pub fn of_service<'a>(
        &'a self,
        service: &ServiceName,
    ) -> impl Iterator<Item = (&'a InstanceId, &'a Instance)> + use<'a> {
        let copies = self.services.get(service).into_iter();
        copies.flat_map(|copies| copies.iter())
    }
}

impl FromIterator<(InstanceId, Instance)> for Instances {
    fn from_iter<T: IntoIterator<Item = (InstanceId, Instance)>>(all: T) -> Self {
        let mut instances = Self::default();
        for (id, instance) in all {
            instances.insert(id, instance);
        }
        instances
    }
}

impl Serialize for Instances {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.iter())
    }
}

impl<'de> Deserialize<'de> for Instances {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let all = BTreeMap::<InstanceId, Instance>::deserialize(deserializer)?;
        Ok(all.into_iter().collect())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::world::{Health, Phase};

    fn instance(service: &str) -> Instance {
        Instance {
            service: service.parse().unwrap(),
            release: kiln_model::ReleaseNumber(1),
            revision: kiln_model::Digest::of(""),
            index: 1,
            job: false,
            addresses: BTreeMap::new(),
            joined: Default::default(),
            phase: Phase::Starting,
            health: Health::Unknown,
            tainted: false,
            created: kiln_model::Millis(0),
        }
    }

    #[test]
    fn a_service_finds_its_own_and_only_these() {
        let ids = ["a-web-1", "a-db-2", "a-web-3"].map(|id| id.parse::<InstanceId>().unwrap());
        let mut instances: Instances = ids
            .iter()
            .zip(["web", "db", "web"])
            .map(|(id, service)| (id.clone(), instance(service)))
            .collect();
        let of = |instances: &Instances, service: &str| -> Vec<InstanceId> {
            let service = service.parse().unwrap();
            instances
                .of_service(&service)
                .map(|(id, _)| id.clone())
                .collect()
        };
        assert_eq!(of(&instances, "web"), [ids[0].clone(), ids[2].clone()]);
        instances.remove(&ids[0]).unwrap();
        assert_eq!(of(&instances, "web"), [ids[2].clone()]);
        instances.remove(&ids[2]).unwrap();
        assert!(of(&instances, "web").is_empty());
        let stored = serde_json::to_string(&instances).unwrap();
        let read: Instances = serde_json::from_str(&stored).unwrap();
        assert_eq!(read, instances);
        assert_eq!(of(&read, "db"), [ids[1].clone()]);
    }
}
