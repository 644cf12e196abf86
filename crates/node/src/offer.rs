//! What an engine serves, and how well that suits a call: the same question for engines of this node and of peers.

use balance::Fit;
use base::ModelName;
use inference::Protocol;
use membership::EngineDescriptor;

use crate::model::Wanted;

/// The service of KServe v2, and what begins the path of its methods.
pub(crate) const KSERVE: &str = "inference.GRPCInferenceService";
const KSERVE_SERVICE: &str = "/inference.GRPCInferenceService/";

/// What a call asks for.
#[derive(Clone, Debug)]
pub(crate) struct Ask {
    /// The method, `/package.Service/Method`.
    pub(crate) path: String,
    /// The model.
    pub(crate) wanted: Wanted,
}

impl Ask {
    /// The service.
    fn service(&self) -> &str {
        let path = self.path.strip_prefix('/').unwrap_or(&self.path);
        path.split_once('/').map_or(path, |(service, _)| service)
    }

    /// The offer of an engine with the one model the call asks for; `None`: it asks for none, or not by name.
    pub(crate) fn named(&self) -> Option<Offer> {
        let Wanted::Model(model) = &self.wanted else { return None };
        let is_kserve = self.path.starts_with(KSERVE_SERVICE);
        is_kserve.then(|| Offer { protocol: Protocol::KserveV2, models: vec![model.clone()] })
    }

    /// The call in words, for messages.
    pub(crate) fn what(&self) -> String {
        match &self.wanted {
            Wanted::Model(model) => format!("model {model}"),
            Wanted::Nothing | Wanted::Unreadable(_) => self.path.clone(),
        }
    }
}

/// What one engine serves.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Offer {
    pub(crate) protocol: Protocol,
    /// Empty: it is sent any.
    pub(crate) models: Vec<ModelName>,
}

/// Whether an engine has a service or a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Has {
    /// It says so.
    Yes,
    /// It does not say what it has.
    Perhaps,
    /// It says what it has, and this is not among it.
    No,
}

impl Offer {
    /// What a peer says of one of its engines; `None`: it speaks what we do not know.
    pub(crate) fn of_peer(engine: &EngineDescriptor) -> Option<Self> {
        let protocol = engine.protocol.parse().ok()?;
        Some(Self { protocol, models: engine.models.clone() })
    }

    /// The names of what the engine says it serves, services and models; `services` is what it reflects.
    pub(crate) fn names<'a>(&'a self, services: &'a [String]) -> impl Iterator<Item = &'a str> {
        let kserve = (self.protocol == Protocol::KserveV2).then_some(KSERVE);
        let models = self.models.iter().map(ModelName::as_str);
        services.iter().map(String::as_str).chain(kserve).chain(models)
    }

    /// Whether the engine has a service or a model of this name; `services` is what it reflects, sorted.
    pub(crate) fn has(&self, name: &str, services: &[String]) -> Has {
        let says_all = match self.protocol {
            Protocol::KserveV2 => !self.models.is_empty(),
            Protocol::Grpc => !services.is_empty(),
        };
        if self.is_called(name) || is_among(name, services) {
            Has::Yes
        } else if says_all {
            Has::No
        } else {
            Has::Perhaps
        }
    }

    /// Whether the engine says that it has a service or a model of this name.
    pub(crate) fn is_called(&self, name: &str) -> bool {
        (self.protocol == Protocol::KserveV2 && name == KSERVE)
            || self.models.iter().any(|model| model.as_str() == name)
    }

    /// How well the engine suits a call, `services` being what it reflects, sorted; `None`: not at all.
    pub(crate) fn fit(&self, ask: &Ask, services: &[String]) -> Option<Fit> {
        let has_service = is_among(ask.service(), services);
        match (self.protocol, ask.path.starts_with(KSERVE_SERVICE)) {
            (Protocol::KserveV2, true) => match &ask.wanted {
                Wanted::Nothing => Some(Fit::Well),
                Wanted::Model(model) if self.models.contains(model) => Some(Fit::Well),
                // An engine that lists no models is asked: it knows best, and its own error says so.
                Wanted::Model(_) | Wanted::Unreadable(_) => {
                    self.models.is_empty().then_some(Fit::Perhaps)
                }
            },
            (Protocol::Grpc, _) | (Protocol::KserveV2, false) if has_service => Some(Fit::Well),
            // One that says nothing of its services may have this one.
            (Protocol::Grpc, _) if services.is_empty() => Some(Fit::Perhaps),
            // One that names others, or has another protocol, may offer more than it says: it is asked last.
            (Protocol::Grpc, _) | (Protocol::KserveV2, false) => Some(Fit::Unlikely),
        }
    }
}

/// Whether a name is among sorted ones.
fn is_among(name: &str, sorted: &[String]) -> bool {
    sorted.binary_search_by(|known| known.as_str().cmp(name)).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offer(protocol: Protocol, models: &[&str]) -> Offer {
        Offer { protocol, models: models.iter().map(|m| m.parse().unwrap()).collect() }
    }

    fn infer(wanted: Wanted) -> Ask {
        Ask { path: format!("{KSERVE_SERVICE}ModelInfer"), wanted }
    }

    fn services(names: &[&str]) -> Vec<String> {
        names.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_model_is_served_by_whoever_lists_it_and_perhaps_by_who_lists_none() {
        let llama = infer(Wanted::Model("llama".parse().unwrap()));
        assert_eq!(offer(Protocol::KserveV2, &["llama", "x"]).fit(&llama, &[]), Some(Fit::Well));
        assert_eq!(offer(Protocol::KserveV2, &["x"]).fit(&llama, &[]), None);
        assert_eq!(offer(Protocol::KserveV2, &[]).fit(&llama, &[]), Some(Fit::Perhaps));
    }

    #[test]
    fn a_call_whose_model_cannot_be_read_goes_to_nobody_who_lists_models() {
        let unreadable = infer(Wanted::Unreadable("garbage".into()));
        assert_eq!(offer(Protocol::KserveV2, &["llama"]).fit(&unreadable, &[]), None);
        assert_eq!(offer(Protocol::KserveV2, &[]).fit(&unreadable, &[]), Some(Fit::Perhaps));
    }

    #[test]
    fn other_services_belong_to_opaque_engines_first() {
        let other = Ask { path: "/p.S/M".into(), wanted: Wanted::Nothing };
        assert_eq!(offer(Protocol::Grpc, &[]).fit(&other, &[]), Some(Fit::Perhaps));
        assert_eq!(offer(Protocol::KserveV2, &["llama"]).fit(&other, &[]), Some(Fit::Unlikely));
        let kserve = infer(Wanted::Nothing);
        assert_eq!(offer(Protocol::Grpc, &[]).fit(&kserve, &[]), Some(Fit::Perhaps));
        assert_eq!(offer(Protocol::KserveV2, &["llama"]).fit(&kserve, &[]), Some(Fit::Well));
    }

    #[test]
    fn who_reflects_a_service_is_asked_before_who_reflects_nothing_or_others() {
        let other = Ask { path: "/p.S/M".into(), wanted: Wanted::Nothing };
        let with = services(&["a.B", "p.S", "z.Z"]);
        for protocol in [Protocol::Grpc, Protocol::KserveV2] {
            assert_eq!(offer(protocol, &[]).fit(&other, &with), Some(Fit::Well));
            let without = services(&["a.B", "z.Z"]);
            assert_eq!(offer(protocol, &[]).fit(&other, &without), Some(Fit::Unlikely));
        }
        let kserve = infer(Wanted::Model("llama".parse().unwrap()));
        let opaque = offer(Protocol::Grpc, &[]);
        assert_eq!(opaque.fit(&kserve, &services(&[KSERVE])), Some(Fit::Well));
        assert_eq!(opaque.fit(&kserve, &with), Some(Fit::Unlikely));
    }

    #[test]
    fn an_engine_has_what_it_says_and_one_that_says_nothing_may_have_anything() {
        let (named, silent) = (services(&["p.S"]), []);
        assert_eq!(offer(Protocol::Grpc, &[]).has("p.S", &named), Has::Yes);
        assert_eq!(offer(Protocol::Grpc, &[]).has("q.S", &named), Has::No);
        assert_eq!(offer(Protocol::Grpc, &[]).has("q.S", &silent), Has::Perhaps);
        let llama = offer(Protocol::KserveV2, &["llama"]);
        assert_eq!((llama.has("llama", &silent), llama.has("x", &silent)), (Has::Yes, Has::No));
        assert_eq!(offer(Protocol::KserveV2, &[]).has("x", &silent), Has::Perhaps);
        assert_eq!(llama.names(&named).collect::<Vec<_>>(), ["p.S", KSERVE, "llama"]);
    }
}
