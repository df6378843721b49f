// Search on pages opened from a disk: there browsers start no Worker, so that the search's script runs in a hidden frame.
// Material's plugin `offline` would load such a stand-in from a network; it looks for a file of this name first.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.append(frame);
      const inside = frame.contentWindow;
      inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      inside.importScripts = () => { throw new Error("this search loads no languages"); };
      const script = inside.document.createElement("script");
      script.src = url;
      this.ready = new Promise((resolve, reject) => { script.onload = resolve; script.onerror = reject; });
      inside.document.body.append(script);
      this.postMessage = (data) => this.ready.then(() => inside.dispatchEvent(new MessageEvent("message", { data })));
    }
  };
}
