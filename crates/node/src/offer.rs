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

    /// The call in words, for messages.
    pub(crate) fn what(&self) -> String {
        match &self.wanted {
            Wanted::Model(model) => format!("model {model}"),
            Wanted::Nothing | Wanted::Unreadable(_) => self.path.clone(),
        }
    }
}

/// What one engine serves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Offer {
    pub(crate) protocol: Protocol,
    /// Empty: it is sent any.
    pub(crate) models: Vec<ModelName>,
}

/// The names of what an engine serves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Called {
    /// Services and models.
    pub(crate) names: Vec<String>,
    /// Whether that is all: otherwise it may have others, and is asked.
    pub(crate) is_all: bool,
}

impl Offer {
    /// What a peer says of one of its engines; `None`: it speaks what we do not know.
    pub(crate) fn of_peer(engine: &EngineDescriptor) -> Option<Self> {
        let protocol = engine.protocol.parse().ok()?;
        Some(Self { protocol, models: engine.models.clone() })
    }

    /// The names of what the engine serves, `services` being what it reflects.
    pub(crate) fn called(&self, services: &[String]) -> Called {
        let kserve = (self.protocol == Protocol::KserveV2).then(|| KSERVE.to_owned());
        let models = self.models.iter().map(ToString::to_string);
        let names: Vec<String> = services.iter().cloned().chain(kserve).chain(models).collect();
        let is_all = match self.protocol {
            Protocol::KserveV2 => !self.models.is_empty(),
            Protocol::Grpc => !services.is_empty(),
        };
        Called { names, is_all }
    }

    /// Whether the engine says that it has a service or a model of this name.
    pub(crate) fn is_called(&self, name: &str) -> bool {
        (self.protocol == Protocol::KserveV2 && name == KSERVE)
            || self.models.iter().any(|model| model.as_str() == name)
    }

    /// How well the engine suits a call, `services` being what it reflects, sorted; `None`: not at all.
    pub(crate) fn fit(&self, ask: &Ask, services: &[String]) -> Option<Fit> {
        let has_service = services.binary_search_by(|known| known.as_str().cmp(ask.service()));
        match (self.protocol, ask.path.starts_with(KSERVE_SERVICE)) {
            (Protocol::KserveV2, true) => match &ask.wanted {
                Wanted::Nothing => Some(Fit::Well),
                Wanted::Model(model) if self.models.contains(model) => Some(Fit::Well),
                // An engine that lists no models is asked: it knows best, and its own error says so.
                Wanted::Model(_) | Wanted::Unreadable(_) => {
                    self.models.is_empty().then_some(Fit::Perhaps)
                }
            },
            (_, false) if has_service.is_ok() => Some(Fit::Well),
            // One that says nothing of its services may have this one; one that names others probably has not.
            (Protocol::Grpc, false) if services.is_empty() => Some(Fit::Well),
            // An engine may offer more than its protocol asks for: health, reflection, services of its own.
            (Protocol::KserveV2 | Protocol::Grpc, false) | (Protocol::Grpc, true) => {
                Some(Fit::Perhaps)
            }
        }
    }
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
        assert_eq!(offer(Protocol::Grpc, &[]).fit(&other, &[]), Some(Fit::Well));
        assert_eq!(offer(Protocol::KserveV2, &["llama"]).fit(&other, &[]), Some(Fit::Perhaps));
        assert_eq!(
            offer(Protocol::Grpc, &[]).fit(&infer(Wanted::Nothing), &[]),
            Some(Fit::Perhaps)
        );
    }

    #[test]
    fn who_reflects_a_service_is_asked_before_who_reflects_others() {
        let ask = Ask { path: "/p.S/M".into(), wanted: Wanted::Nothing };
        let services = |names: &[&str]| names.iter().map(ToString::to_string).collect::<Vec<_>>();
        for protocol in [Protocol::Grpc, Protocol::KserveV2] {
            let offer = offer(protocol, &[]);
            assert_eq!(offer.fit(&ask, &services(&["a.B", "p.S", "z.Z"])), Some(Fit::Well));
            assert_eq!(offer.fit(&ask, &services(&["a.B", "z.Z"])), Some(Fit::Perhaps));
        }
        let called = offer(Protocol::Grpc, &[]).called(&services(&["p.S"]));
        assert_eq!(called, Called { names: services(&["p.S"]), is_all: true });
        let called = offer(Protocol::KserveV2, &["llama"]).called(&[]);
        assert_eq!(called, Called { names: services(&[KSERVE, "llama"]), is_all: true });
        assert!(!offer(Protocol::KserveV2, &[]).called(&[]).is_all);
    }
}
