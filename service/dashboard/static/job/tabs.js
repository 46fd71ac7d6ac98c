// The tabs of a job. A tab is created when it is opened, and updated with every poll of the job.
import { h } from "../dom.js";
import { count, dateTime, timeOrDateTime } from "../format.js";
import { CheckpointsTab } from "./checkpoints-tab.js";
import { ConfigTab } from "./config-tab.js";
import { ListTab, cell, changeMark } from "./list-tab.js";
import { LogsTab } from "./logs-tab.js";
import { MetricsTab } from "./metrics-tab.js";
import { SamplesTab } from "./samples-tab.js";

class OverviewTab extends ListTab {
  constructor(place, address) {
    super(place, address, {
      path: "/attempts", caption: "Attempts", none: "Not launched yet.", mark: changeMark, key: (one) => `${one.id} ${one.ended_at} ${one.started_at}`,
      columns: [["Attempt"], ["Trigger"], ["From step", "num"], ["To step", "num"], ["Devices"], ["Started"], ["Ended"], ["Outcome"]],
      row: (one) => h("tr", {}, cell(String(one.number)), cell(one.trigger), cell(count(one.start_step), "num"), cell(count(one.end_step), "num"), cell(one.devices.join(", ")),
        cell(timeOrDateTime(one.started_at), "", dateTime(one.started_at)), cell(timeOrDateTime(one.ended_at), "", dateTime(one.ended_at)), cell(one.message ?? one.outcome, "whole")),
    });
  }
}

class EventsTab extends ListTab {
  constructor(place, address) {
    super(place, address, {
      path: "/events", caption: "Events, newest first", none: "No events yet.", mark: (job) => `${changeMark(job)} ${job.progress.updated_at}`,
      columns: [["When"], ["By"], ["Event"], ["Message"]],
      row: (one) => h("tr", {}, cell(timeOrDateTime(one.at), "num", dateTime(one.at)), cell(one.actor), cell(one.kind), cell(one.message, "whole")),
    });
    this.newestFirst = true;
  }
}

export const TABS = { overview: OverviewTab, metrics: MetricsTab, logs: LogsTab, checkpoints: CheckpointsTab, samples: SamplesTab, config: ConfigTab, events: EventsTab };
