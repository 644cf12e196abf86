//! What one tenant may call: its rules, with those of others left out.

use base::{ModelName, TenantName};

use crate::config::{AllowConfig, Glob, ServiceGlob};

/// On whose behalf a call is made.
#[derive(Debug)]
pub(crate) struct Tenant {
    name: TenantName,
    rules: Box<[Rule]>,
}

#[derive(Debug)]
struct Rule {
    models: Option<Box<[Glob]>>,
    services: Option<Box<[ServiceGlob]>>,
}

/// Whether a method may be called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Yes, whichever model it is for.
    Allowed,
    /// Yes, for some models.
    ForSomeModels,
    /// No.
    Refused,
}

impl Tenant {
    pub(crate) fn new(name: TenantName, allow: &[AllowConfig]) -> Self {
        let own = allow.iter().filter(|rule| rule.tenant.covers(name.as_str()));
        let rules = own.map(|rule| Rule {
            models: rule.models.clone().map(Into::into),
            services: rule.services.clone().map(Into::into),
        });
        let rules = rules.collect();
        Self { name, rules }
    }

    pub(crate) fn name(&self) -> &TenantName {
        &self.name
    }

    /// Whether it may call the method at `path`, before anything of the request is read.
    pub(crate) fn may_call(&self, path: &str) -> Verdict {
        let mut verdict = Verdict::Refused;
        for rule in self.covering(path) {
            if rule.models.is_none() {
                return Verdict::Allowed;
            }
            verdict = Verdict::ForSomeModels;
        }
        // No model is read from other methods.
        if inference::kserve_model_field(path).is_none() { Verdict::Refused } else { verdict }
    }

    /// Whether it may call the method at `path` for `model`.
    pub(crate) fn may_call_model(&self, path: &str, model: &ModelName) -> bool {
        self.covering(path).any(|rule| {
            rule.models
                .as_ref()
                .is_none_or(|models| models.iter().any(|glob| glob.covers(model.as_str())))
        })
    }

    fn covering(&self, path: &str) -> impl Iterator<Item = &Rule> {
        self.rules.iter().filter(move |rule| {
            rule.services
                .as_ref()
                .is_none_or(|services| services.iter().any(|service| service.covers(path)))
        })
    }
}
