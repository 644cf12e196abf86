//! Which services can be called through this node, and how they are declared: what its engines reflect, what peers reflect
//! of theirs, and what the node has built in for engines that reflect nothing (MLServer, for one).
//!
//! Filled by `collect`, read by `reflection`, `health` and the gossip port, which tells peers which services there are.

use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering},
};

use inference::Reflected;
use membership::{Descriptor, is_service};
use parking_lot::Mutex;
use prost_reflect::DescriptorPool;

use crate::{engines::Engine, offer::KSERVE, peers::Board};

/// Bytes of names of services a node tells others about: a descriptor must fit in a frame.
pub(crate) const NAMES_BYTES_MAX: usize = 16 << 10;
/// What every node answers itself.
pub(crate) const BUILT_IN: [&str; 3] = [
    "grpc.health.v1.Health",
    "grpc.reflection.v1.ServerReflection",
    "grpc.reflection.v1alpha.ServerReflection",
];

/// What one server declares.
#[derive(Debug, Default)]
pub(crate) struct Declared {
    /// Sorted, without those every server has.
    pub(crate) services: Vec<String>,
    pub(crate) pool: DescriptorPool,
}

impl Declared {
    /// What a server reflects, if it is consistent.
    pub(crate) fn new(reflected: Reflected) -> Result<Self, String> {
        let pool = DescriptorPool::decode(reflected.files.as_slice()).map_err(|e| e.to_string())?;
        let mut services = reflected.services;
        let mut bytes = 0;
        services.retain(|service| {
            bytes += service.len();
            !BUILT_IN.contains(&service.as_str()) && is_service(service) && bytes <= NAMES_BYTES_MAX
        });
        Ok(Self { services, pool })
    }
}

/// Everything known. Shared by all workers.
#[derive(Debug)]
pub(crate) struct Catalog {
    engines: Arc<[Arc<Engine>]>,
    board: Arc<Board>,
    peers: Vec<Mutex<Arc<Declared>>>,
    /// Counts up with every change of what this node says of itself.
    version: AtomicU32,
    built_in: Declared,
}

/// Whose services are meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scope {
    /// This node's engines: what peers ask for.
    Here,
    /// The whole mesh: what clients ask for.
    Mesh,
}

impl Catalog {
    pub(crate) fn new(engines: Arc<[Arc<Engine>]>, board: Arc<Board>) -> Self {
        let peers = board.names().iter().map(|_| Mutex::default()).collect();
        // A test decodes the same bytes; without them reflection knows less, and calls go on.
        let pool = DescriptorPool::decode(proto::FILE_DESCRIPTOR_SET).unwrap_or_default();
        let built_in = Declared { services: Vec::new(), pool };
        Self { engines, board, peers, version: AtomicU32::new(1), built_in }
    }

    /// Engine `index` of this node reflects this.
    pub(crate) fn engine_declares(&self, index: usize, declared: Declared) {
        let Some(engine) = self.engines.get(index) else { return };
        let before = engine.declare(declared);
        if before.services != engine.declared().services {
            self.version.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Peer `index` reflects this of its engines.
    pub(crate) fn peer_declares(&self, index: usize, declared: Declared) {
        if let Some(peer) = self.peers.get(index) {
            *peer.lock() = Arc::new(declared);
        }
    }

    /// The version of [`Catalog::descriptor`].
    pub(crate) fn version(&self) -> u32 {
        self.version.load(Ordering::Relaxed)
    }

    /// What this node says of itself to peers.
    pub(crate) fn descriptor(&self) -> Descriptor {
        // Read first: services that change meanwhile are told again under the next version.
        let version = self.version();
        let mut left = NAMES_BYTES_MAX;
        let engines = self.engines.iter().map(|engine| {
            let mut descriptor = engine.describe();
            descriptor.services.retain(|service| {
                let fits = service.len() <= left;
                left -= if fits { service.len() } else { 0 };
                fits
            });
            descriptor
        });
        Descriptor { version, engines: engines.collect() }
    }

    /// The services of `scope`, sorted, those every node answers itself included.
    pub(crate) fn services(&self, scope: Scope) -> Vec<String> {
        let mut services: Vec<String> = BUILT_IN.map(str::to_owned).to_vec();
        services.extend(self.sources(scope).iter().flat_map(|source| source.services.clone()));
        let has_kserve = self.engines.iter().any(|engine| engine.offer.is_called(KSERVE))
            || (scope == Scope::Mesh && !self.board.standings(KSERVE).is_empty());
        if has_kserve {
            services.push(KSERVE.to_owned());
        }
        services.sort();
        services.dedup();
        services
    }

    /// The models somebody lists, sorted.
    pub(crate) fn models(&self) -> Vec<String> {
        let own = self.engines.iter().flat_map(|engine| &engine.offer.models);
        let mut models: Vec<String> = own.map(ToString::to_string).collect();
        models.extend(self.board.models());
        models.sort();
        models.dedup();
        models
    }

    /// Looks something up: in what the engines here declare, then the peers, then what is built in.
    pub(crate) fn find<T>(
        &self,
        scope: Scope,
        look: impl Fn(&DescriptorPool) -> Option<T>,
    ) -> Option<T> {
        let sources = self.sources(scope);
        sources.iter().find_map(|source| look(&source.pool)).or_else(|| look(&self.built_in.pool))
    }

    fn sources(&self, scope: Scope) -> Vec<Arc<Declared>> {
        let own = self.engines.iter().map(|engine| engine.declared());
        let peers = self.peers.iter().map(|peer| peer.lock().clone());
        match scope {
            Scope::Here => own.collect(),
            Scope::Mesh => own.chain(peers).collect(),
        }
    }
}
