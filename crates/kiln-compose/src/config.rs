//! What `kiln config` prints.

use serde_json::Value as Json;

use crate::output;
use crate::project::Project;

/// The form of [`Project::config`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConfigFormat {
    Json,
    Yaml,
}

impl Project {
    /// The resolved model as `docker compose config` prints it; it can be read again as a
    /// compose file.
    pub fn config(&self, format: ConfigFormat) -> String {
        match format {
            _ if self.raw => self.raw_config(format),
            ConfigFormat::Json => {
                let json = self.config_json();
                serde_json::to_string_pretty(&json).unwrap_or_else(|_| json.to_string())
            }
            ConfigFormat::Yaml => self.to_config_yaml(),
        }
    }

    /// The tree with its `${…}`, keys sorted; dollars stay as they are.
    fn raw_config(&self, format: ConfigFormat) -> String {
        let json = output::sorted(output::to_json(&self.tree));
        match format {
            ConfigFormat::Json => {
                serde_json::to_string_pretty(&json).unwrap_or_else(|_| json.to_string())
            }
            ConfigFormat::Yaml => output::to_yaml(&json),
        }
    }

    /// The model `docker compose config --format json` prints: dollars doubled, `x-` keys at
    /// the top level only, no models.
    pub fn config_json(&self) -> Json {
        let mut json = self.model(false);
        if let Some(map) = json.as_object_mut() {
            map.shift_remove("models");
        }
        output::escape_dollars(&mut json);
        json
    }

    /// As YAML, with `x-` keys everywhere and without what says nothing.
    pub fn to_config_yaml(&self) -> String {
        let mut json = self.model(true);
        drop_empty(&mut json);
        whole_ulimits(&mut json);
        output::escape_dollars(&mut json);
        output::to_yaml(&json)
    }
}

/// Go's JSON leaves zeros out of a pair of limits; its YAML does not.
fn whole_ulimits(json: &mut Json) {
    let services = json.get_mut("services").and_then(Json::as_object_mut);
    for service in services.into_iter().flatten().map(|(_, service)| service) {
        for place in ["/ulimits", "/build/ulimits"] {
            let limits = service.pointer_mut(place).and_then(Json::as_object_mut);
            for pair in limits.into_iter().flatten().map(|(_, pair)| pair) {
                if let Some(said) = pair.as_object() {
                    let of = |key: &str| said.get(key).cloned().unwrap_or_else(|| 0.into());
                    *pair = serde_json::json!({"soft": of("soft"), "hard": of("hard")});
                }
            }
        }
    }
}

/// Takes out what JSON has for completeness only: null commands, empty `ipam`, `placement`,
/// `resources` and `exec`.
fn drop_empty(json: &mut Json) {
    match json {
        Json::Object(map) => {
            map.values_mut().for_each(drop_empty);
            map.retain(|key, value| match key.as_str() {
                "command" | "entrypoint" => !value.is_null(),
                "ipam" | "placement" | "resources" | "exec" => {
                    value.as_object().is_none_or(|map| !map.is_empty())
                }
                _ => true,
            });
        }
        Json::Array(list) => list.iter_mut().for_each(drop_empty),
        _ => {}
    }
}
