//! Which services can be called through this node, and how they are declared: what its engines reflect, what peers reflect
//! of theirs, and what the node has built in for engines that reflect nothing (MLServer, for one).
//!
//! Filled by `collect`, read by `reflection` and the gossip port, which tells peers which services there are.

use std::{collections::BTreeMap, sync::Arc};

use inference::{Declarations, Reflected};
use membership::{Descriptor, Frame, STREAM_BYTES_MAX, is_service};
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::{engines::Engine, offer::KSERVE, peers::Board, services::ANSWERED};

/// Bytes of names of services a node tells others about, at most; fewer where its models fill the descriptor.
const NAMES_BYTES_MAX: usize = 16 << 10;
/// What a name costs in a descriptor besides its bytes: a tag and a length of up to two bytes.
const NAME_OVERHEAD_BYTES: usize = 3;
/// What the lengths of a descriptor may grow by when names are added to it.
const DESCRIPTOR_SLACK_BYTES: usize = 256;
/// Services of one server that are named to others.
const SERVICES_MAX: usize = 1024;

/// Everything known. Shared by all workers.
#[derive(Debug)]
pub(crate) struct Catalog {
    engines: Arc<[Arc<Engine>]>,
    board: Arc<Board>,
    /// What peers declare, by the services they say they have: who has the same is taken to declare them the same.
    peers: Mutex<BTreeMap<Arc<[String]>, Arc<Reflected>>>,
    /// Counts up with every change of what this node says of itself.
    version: watch::Sender<u32>,
    built_in: Declarations,
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
        // A test reads the same bytes; without them reflection knows less, and calls go on.
        let built_in = Declarations::of_set(proto::FILE_DESCRIPTOR_SET).unwrap_or_default();
        Self { engines, board, peers: Mutex::default(), version: watch::Sender::new(1), built_in }
    }

    /// Engine `index` of this node reflects this.
    pub(crate) fn engine_reflects(&self, index: usize, reflected: Reflected) {
        let Some(engine) = self.engines.get(index) else { return };
        let before = engine.reflect(named(reflected));
        if before != engine.reflected() {
            self.version.send_modify(|version| *version = version.wrapping_add(1));
        }
    }

    /// A peer that says it has these services reflects this.
    pub(crate) fn peer_reflects(&self, services: Arc<[String]>, reflected: Reflected) {
        self.peers.lock().insert(services, Arc::new(named(reflected)));
    }

    /// Forgets what peers declare of sets of services, but for those to `keep`.
    pub(crate) fn keep_peers(&self, keep: impl Fn(&Arc<[String]>) -> bool) {
        self.peers.lock().retain(|services, _| keep(services));
    }

    /// The version of [`Catalog::descriptor`].
    pub(crate) fn version(&self) -> u32 {
        *self.version.borrow()
    }

    /// Word of every newer version.
    pub(crate) fn changes(&self) -> watch::Receiver<u32> {
        self.version.subscribe()
    }

    /// What this node says of itself to peers. Names of services that do not fit in a frame are left out.
    pub(crate) fn descriptor(&self) -> Descriptor {
        // Read first: services that change meanwhile are told again under the next version.
        let version = self.version();
        let engines = self.engines.iter().map(|engine| engine.describe()).collect();
        let mut descriptor = Descriptor { version, engines };
        let names: Vec<Arc<Reflected>> = self.engines.iter().map(|e| e.reflected()).collect();
        let without = membership::encode(&Frame::Descriptor(descriptor.clone())).len();
        let mut left =
            STREAM_BYTES_MAX.saturating_sub(without + DESCRIPTOR_SLACK_BYTES).min(NAMES_BYTES_MAX);
        for (engine, reflected) in descriptor.engines.iter_mut().zip(names) {
            for service in &reflected.services {
                let cost = service.len() + NAME_OVERHEAD_BYTES;
                if cost <= left && engine.services.len() < SERVICES_MAX {
                    left -= cost;
                    engine.services.push(service.clone());
                }
            }
        }
        descriptor
    }

    /// The services of `scope`, sorted, those every node answers itself included.
    pub(crate) fn services(&self, scope: Scope) -> Vec<String> {
        let mut services: Vec<String> =
            ANSWERED.iter().map(|service| (*service).to_owned()).collect();
        services.extend(self.sources(scope).iter().flat_map(|source| source.services.clone()));
        let has_kserve = self.engines.iter().any(|engine| engine.offer.is_called(KSERVE))
            || (scope == Scope::Mesh && self.board.has(KSERVE));
        if has_kserve {
            services.push(KSERVE.to_owned());
        }
        services.sort();
        services.dedup();
        services
    }

    /// Looks something up: in what the engines here declare, then the peers, then what is built in.
    pub(crate) fn find<T>(
        &self,
        scope: Scope,
        look: impl Fn(&Declarations) -> Option<T>,
    ) -> Option<T> {
        let sources = self.sources(scope);
        let all = sources.iter().flat_map(|source| &source.declarations);
        all.chain([&self.built_in]).find_map(look)
    }

    fn sources(&self, scope: Scope) -> Vec<Arc<Reflected>> {
        let own = self.engines.iter().map(|engine| engine.reflected());
        match scope {
            Scope::Here => own.collect(),
            Scope::Mesh => own.chain(self.peers.lock().values().cloned()).collect(),
        }
    }
}

/// What a server reflects, without what every node answers itself and what is no name.
fn named(mut reflected: Reflected) -> Reflected {
    let is_own = |service: &str| ANSWERED.contains(&service);
    reflected.services.retain(|service| !is_own(service) && is_service(service));
    reflected
}

#[cfg(test)]
mod tests {
    use rand::{SeedableRng as _, rngs::StdRng};

    use super::*;
    use crate::{
        config::Config,
        services::{HEALTH, REFLECTION, REPORTS},
    };

    fn catalog(models: usize) -> Catalog {
        let models: Vec<String> = (0..models).map(|i| format!("\"model-{i:0>20}\"")).collect();
        let text = format!(
            "[node]\nname = \"a\"\n[[engine]]\nname = \"e\"\nurl = \"http://127.0.0.1:1\"\nprotocol = \"kserve-v2\"\nmodels = [{}]",
            models.join(", ")
        );
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a.toml");
        std::fs::write(&file, text).unwrap();
        let config = Config::load(&file, &[]).unwrap();
        let mut rng = StdRng::seed_from_u64(1);
        let engines = config.engines.iter().map(|e| Arc::new(Engine::new(e, &mut rng))).collect();
        Catalog::new(engines, Arc::new(Board::of_test(&[])))
    }

    fn reflected(services: impl IntoIterator<Item = String>) -> Reflected {
        Reflected { services: services.into_iter().collect(), declarations: vec![] }
    }

    #[test]
    fn what_is_built_in_can_be_looked_up() {
        let catalog = catalog(1);
        for symbol in [HEALTH, REPORTS, REFLECTION[0], REFLECTION[1], KSERVE] {
            let found = catalog.find(Scope::Here, |declarations| declarations.symbol(symbol));
            assert!(found.is_some(), "{symbol}");
        }
    }

    #[test]
    fn a_change_is_a_new_version_and_the_same_again_is_none() {
        let catalog = catalog(1);
        let first = catalog.version();
        catalog.engine_reflects(0, reflected(["p.S".to_owned(), HEALTH.to_owned()]));
        assert_eq!(catalog.version(), first + 1);
        assert_eq!(catalog.descriptor().engines[0].services, ["p.S"]);
        catalog.engine_reflects(0, reflected(["p.S".to_owned()]));
        assert_eq!(catalog.version(), first + 1);
        let declarations = Declarations::of_set(proto::FILE_DESCRIPTOR_SET).unwrap();
        let changed =
            Reflected { declarations: vec![declarations], ..reflected(["p.S".to_owned()]) };
        catalog.engine_reflects(0, changed);
        assert_eq!(catalog.version(), first + 2, "the same names, declared anew");
    }

    #[test]
    fn what_peers_declare_is_known_to_clients_by_the_services_they_say_they_have() {
        let catalog = catalog(1);
        let (one, two): (Arc<[String]>, Arc<[String]>) =
            (["p.S".to_owned()].into(), ["q.S".to_owned()].into());
        catalog.peer_reflects(one.clone(), reflected(["p.S".to_owned(), HEALTH.to_owned()]));
        catalog.peer_reflects(one.clone(), reflected(["p.S".to_owned()]));
        catalog.peer_reflects(two, reflected(["q.S".to_owned()]));
        assert_eq!(catalog.peers.lock().len(), 2);
        assert!(catalog.services(Scope::Mesh).contains(&"p.S".to_owned()));
        assert!(!catalog.services(Scope::Here).contains(&"p.S".to_owned()));
        catalog.keep_peers(|services| *services == one);
        assert!(!catalog.services(Scope::Mesh).contains(&"q.S".to_owned()));
    }

    #[test]
    fn a_descriptor_fits_in_a_frame_however_much_is_reflected() {
        for models in [1, 1_500, 2_000] {
            let catalog = catalog(models);
            let many = (0..5_000).map(|i| format!("a.package.of.some.length.Service{i}"));
            catalog.engine_reflects(0, reflected(many.chain((0..5_000).map(|i| format!("S{i}")))));
            let descriptor = catalog.descriptor();
            let bytes = membership::encode(&Frame::Descriptor(descriptor.clone()));
            assert!(bytes.len() <= STREAM_BYTES_MAX, "{}", bytes.len());
            assert_eq!(membership::decode(&bytes), Ok(Frame::Descriptor(descriptor)));
        }
    }
}
