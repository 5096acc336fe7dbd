//! What happens, in words: the events that people and `kiln up` follow. Nothing here
//! decides or changes anything.

use kiln_plan::{EffectKey, Event, Phase, World};

use crate::api::types::{EventKind, OutlineLine};
use crate::engine::Engine;

impl Engine {
    pub(crate) fn tell_failure(&self, event: &Event) {
        match event {
            Event::Failed { key, cause } => self.warn(format!("{}: {cause}", name_of(key))),
            Event::StartFailed { id, cause } => {
                let service = self
                    .keeper
                    .world
                    .instances
                    .get(id)
                    .map(|i| i.service.clone());
                let text = format!("{id} could not be started: {cause}");
                self.tell(service, Some(id.clone()), EventKind::Warning, text);
            }
            Event::Unhealthy { id, reason } => {
                let service = self
                    .keeper
                    .world
                    .instances
                    .get(id)
                    .map(|i| i.service.clone());
                let text = format!("{id} is unhealthy: {reason}");
                self.tell(service, Some(id.clone()), EventKind::Warning, text);
            }
            Event::Routed {
                failed: Some(cause),
                ..
            } => self.warn(cause.clone()),
            _ => {}
        }
    }

    pub(crate) fn tell_changes(&self, before: &World) {
        for (id, instance) in self.keeper.world.instances.iter() {
            let old = before.instances.get(id).map(|i| &i.phase);
            let changed = old.is_none_or(|phase| {
                std::mem::discriminant(phase) != std::mem::discriminant(&instance.phase)
            });
            if changed {
                let phase = phase_name(&instance.phase);
                let text = match &instance.phase {
                    Phase::Ended { status, .. } => format!("{id} {status}"),
                    _ => format!("{id} {phase}"),
                };
                let kind = EventKind::Instance {
                    phase: phase.to_owned(),
                };
                self.tell(Some(instance.service.clone()), Some(id.clone()), kind, text);
            }
        }
        for (id, instance) in before.instances.iter() {
            if !self.keeper.world.instances.contains_key(id) {
                let kind = EventKind::Instance {
                    phase: "gone".into(),
                };
                let text = format!("{id} is gone");
                self.tell(Some(instance.service.clone()), Some(id.clone()), kind, text);
            }
        }
    }
}

/// A phase in one word.
pub fn phase_name(phase: &Phase) -> &'static str {
    match phase {
        Phase::Starting => "starting",
        Phase::Warming { .. } => "warming",
        Phase::Ready { .. } => "ready",
        Phase::Draining => "draining",
        Phase::Stopping => "stopping",
        Phase::Ended { .. } => "ended",
        Phase::Removing => "removing",
    }
}

pub(crate) fn name_of(key: &EffectKey) -> String {
    match key {
        EffectKey::Networks => "setting up networks".into(),
        EffectKey::Start(id) => format!("starting {id}"),
        EffectKey::Observe(id) => format!("watching {id}"),
        EffectKey::Route => "telling the proxy".into(),
        EffectKey::Measure => "asking the proxy for its counts".into(),
        EffectKey::Query(service) => format!("asking Prometheus about {service}"),
        EffectKey::Drain(id) => format!("draining {id}"),
        EffectKey::Stop(id) => format!("stopping {id}"),
        EffectKey::Remove(id) => format!("removing {id}"),
        EffectKey::Conclude => "concluding".into(),
    }
}

pub(crate) fn outline_lines(steps: Vec<kiln_plan::outline::Step>) -> Vec<OutlineLine> {
    use kiln_plan::outline::Action;
    steps
        .into_iter()
        .map(|step| {
            let action = match step.action {
                Action::Create => "create",
                Action::Replace => "replace",
                Action::Handoff => "hand over",
                Action::RunJob => "run",
                Action::Adjust => "adjust",
                Action::Keep => "keep",
                Action::Remove => "remove",
            };
            OutlineLine {
                service: step.service,
                action: action.into(),
                why: step.why,
                steps: step.steps,
            }
        })
        .collect()
}
